"""Does a block, ours or anybody's, compute the paper's non-local operation, and what is wrong with it?

    from nlutils import conformance
    print(conformance.check(nlutils.torch.NonLocalBlock(16), torch.zeros(2, 16, 4, 6, 6)))

Wang, Girshick, Gupta, He: Non-local Neural Networks, CVPR 2018, https://arxiv.org/abs/1711.07971
"""

from nlutils.conformance.check import check
from nlutils.conformance.recorded import Record, code_digest, read_recorded, write_record
from nlutils.conformance.report import Report, Result

__all__ = ["Record", "Report", "Result", "check", "code_digest", "read_recorded", "write_record"]
