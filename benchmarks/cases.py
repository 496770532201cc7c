"""What is measured: one `Case` a recorded file, with the numbers to reach."""

from dataclasses import dataclass

__all__ = ["CASES", "FIXED", "SIZES", "Case", "Target", "judge", "judge_record"]

# A memory variant whose name ends so runs with glibc's mmap threshold fixed at its first value: every large
# buffer then goes back to the system when it is freed. By default the threshold grows with what was freed.
FIXED = "_fixed_threshold"

# N positions as the maps of real networks have them: T, H, W.
SIZES = {784: (4, 14, 14), 1568: (8, 14, 14), 6272: (8, 28, 28), 25088: (8, 56, 56), 100352: (32, 56, 56)}
FORMS = ("dot_product", "concatenation", "embedded_gaussian", "gaussian")
BOTH = ("forward", "training")


@dataclass(frozen=True)
class Target:
    """A number to reach: for `variant` ("every peer": for each one) and `passed` ("forward", "training", …).

    sense "at least": times faster than the variant; "at most": MiB, or how often the time fits.
    """

    variant: str
    passed: str
    sense: str
    bound: float


@dataclass(frozen=True)
class Case:
    """One measurement.

    measure   "time": ours beside others, in turns; "memory": the peak of each variant, a process each;
              "growth": the time of ours on `size` and on `base`
    level     "block": with convolutions and normalisation; "operation": theta, phi, g -> y alone
    variants  ours is "nlutils" ("nlutils_2d" on a map without time); the others are peers or plain forms
    raises    variants whose backward pass raises an error, which is recorded instead of a time
    gib       memory that must be free before it starts
    """

    name: str
    measure: str
    instantiation: str
    size: tuple
    variants: tuple
    targets: tuple = ()
    passes: tuple = BOTH
    channels: int = 256
    level: str = "block"
    framework: str = "torch"
    repeats: int = 7
    base: tuple = ()
    raises: tuple = ()
    gib: float = 1.0

    @property
    def positions(self) -> int:
        """N."""
        frames, height, width = self.size
        return frames * height * width

    @property
    def inner(self) -> int:
        """The width of theta, phi and g."""
        return self.channels // 2


def _faster(variant, **bounds):
    return tuple(Target(variant, name, "at least", bound) for name, bound in bounds.items())


def _time(form, count, variants, targets, **options):
    named = f"{form}-{count}"
    if options.get("channels", 256) != 256:
        named += f"-c{options['channels']}"
    return Case(named, "time", form, SIZES[count], ("nlutils", *variants), targets, **options)


def _memory(form, count, variants, bound=None, **options):
    targets = (Target("nlutils", "training", "at most", bound),) if bound else ()
    named = f"{form}-{count}-memory"
    variants, options = ("nlutils", *variants), {"passes": ("training",), "repeats": 1, **options}
    return Case(named, "memory", form, SIZES[count], variants, targets, **options)


def _growth(form, bound):
    targets = (Target("nlutils", "training", "at most", bound),)
    return Case(
        f"{form}-growth",
        "growth",
        form,
        SIZES[100352],
        ("nlutils",),
        targets,
        base=SIZES[25088],
        repeats=5,
        gib=3,
    )


def _torch():
    yield _time("dot_product", 784, ("mmcv", "pytorchvideo"), (), repeats=25)
    yield _time("dot_product", 6272, ("mmcv", "pytorchvideo"), _faster("mmcv", training=12), repeats=21)
    yield _time("dot_product", 25088, ("mmcv",), _faster("mmcv", training=45), repeats=3, gib=8)

    pairs = ("mmcv", "materialised_pairs")
    for count, bound, gib in ((784, 140, 3), (1568, 350, 9)):
        # Forward beside mmcv's own; its backward pass raises, so training beside the same out of place.
        targets = _faster("mmcv", forward=bound) + _faster("materialised_pairs", training=bound)
        yield _time("concatenation", count, pairs, targets, raises=("mmcv",), repeats=5, gib=gib)
    yield Case(
        "concatenation-6272-operation",
        "time",
        "concatenation",
        SIZES[6272],
        ("nlutils", "materialised_sums"),
        _faster("materialised_sums", training=50),
        level="operation",
        gib=2,
    )

    soft = ("mmcv", "pytorchvideo", "nlutils_2d", "timm")
    never_slower = _faster("every peer", forward=0.95, training=0.95)
    for count, repeats in ((784, 25), (1568, 15)):
        yield _time("embedded_gaussian", count, soft, never_slower, repeats=repeats)
    targets = _faster("every peer", forward=1.6, training=1.25)
    yield _time("embedded_gaussian", 6272, soft, targets, gib=2)
    targets = _faster("every peer", forward=0.95, training=1.5)
    yield _time("embedded_gaussian", 25088, soft, targets, repeats=3, gib=12)

    for channels in (256, 512):
        targets = _faster("mmcv", forward=1.2, training=0.95)
        yield _time("gaussian", 6272, ("mmcv",), targets, channels=channels, gib=2)

    peers = {
        "dot_product": ("mmcv", "pytorchvideo"),
        "concatenation": (),  # N^2 times 2 C' numbers: 600 GiB
        "embedded_gaussian": ("mmcv", "pytorchvideo", "timm"),
        "gaussian": ("mmcv",),
    }
    for form in FORMS:
        variants = (f"nlutils{FIXED}", *peers[form])
        yield _memory(form, 25088, variants, 200, gib=12 if peers[form] else 1)
    yield _memory("concatenation", 1568, ("materialised_pairs",), gib=9)
    for form in FORMS:
        yield _memory(form, 100352, (), 700, gib=3)
    yield _growth("dot_product", 5.5)
    yield _growth("concatenation", 6)


def _keras():
    passes = ("forward graph", "training graph", "forward jit", "training jit")
    for form, bound in (("dot_product", 30), ("concatenation", 5)):
        judged = passes if form == "dot_product" else passes[2:]
        yield Case(
            f"keras-{form}-6272",
            "time",
            form,
            SIZES[6272],
            ("nlutils", "materialised"),
            tuple(Target("materialised", name, "at least", bound) for name in judged),
            passes,
            level="operation",
            framework="keras",
            repeats=5,
            gib=3,
        )
    passes = ("training graph", "training jit")
    for form in FORMS:
        judged = passes if form.endswith("gaussian") else ()
        for level, word in (("block", ""), ("operation", "-operation")):
            yield Case(
                f"keras-{form}-25088{word}-memory",
                "memory",
                form,
                SIZES[25088],
                ("nlutils",),
                tuple(Target("nlutils", name, "at most", 256) for name in judged),
                passes,
                level=level,
                framework="keras",
                repeats=1,
                gib=3,
            )


CASES = {case.name: case for case in (*_torch(), *_keras())}


def judge(case: Case, values: dict, others: tuple) -> list[dict]:
    """Each target of `case` beside what was measured: a list of records.

    `values` is {variant: {pass: number}}: ratios for "time" and "growth", MiB for "memory"; `others` are the
    variants that "every peer" stands for. Of what was not measured, `met` is None.
    """
    judged = []
    for target in case.targets:
        for variant in others if target.variant == "every peer" else (target.variant,):
            value = values.get(variant, {}).get(target.passed)
            met = None
            if value is not None:
                met = value >= target.bound if target.sense == "at least" else value <= target.bound
            judged.append(
                {
                    "variant": variant,
                    "pass": target.passed,
                    "sense": target.sense,
                    "bound": target.bound,
                    "value": value,
                    "met": met,
                }
            )
    return judged


def judge_record(case: Case, record: dict) -> list[dict]:
    """`judge` on what a record holds: its "ratios" if it has them, else its "medians"."""
    others = tuple(name for name in record.get("ours", ()) if name != "plain") or ("plain",)
    return judge(case, record.get("ratios") or record["medians"], others)
