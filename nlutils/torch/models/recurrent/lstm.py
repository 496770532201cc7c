"""An LSTM with peepholes."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PeepholeLSTM"]


class PeepholeLSTM(nn.LSTM):
    """Stacked LSTMs whose gates also see the cell: (B, T, D) -> (B, T, hidden), and the last h and c.

    Gers, Schraudolph, Schmidhuber: Learning Precise Timing with LSTM Recurrent Networks, JMLR 2002,

        i_t = sigmoid(W_i [x_t, h_{t-1}] + b_i + p_i c_{t-1}),  f_t likewise
        c_t = f_t c_{t-1} + i_t tanh(W_g [x_t, h_{t-1}] + b_g)
        h_t = sigmoid(W_o [x_t, h_{t-1}] + b_o + p_o c_t) tanh(c_t)

    with one weight p a gate and cell: `peephole_l0`, `peephole_l1` ..., (3, hidden) in the order i, f, o.
    They start at zero; then this is `nn.LSTM`, whose other parameters it has under the same names. Each step
    is a turn of a Python loop.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1):
        super().__init__(input_size, hidden_size, num_layers, batch_first=True)
        for layer in range(num_layers):
            self.register_parameter(f"peephole_l{layer}", nn.Parameter(torch.zeros(3, hidden_size)))

    def forward(self, x):
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            x, c = self._layer(x, layer)
            last_h.append(x[:, -1])
            last_c.append(c)
        return x, (torch.stack(last_h), torch.stack(last_c))

    def _layer(self, x, layer):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "peephole")
        w_ih, w_hh, b_ih, b_hh, (p_i, p_f, p_o) = (getattr(self, f"{name}_l{layer}") for name in names)
        from_input = F.linear(x, w_ih, b_ih + b_hh)  # (B, T, 4 hidden)
        h = c = x.new_zeros(len(x), self.hidden_size)
        states = []
        for gates in from_input.unbind(dim=1):
            i, f, g, o = (gates + F.linear(h, w_hh)).chunk(4, dim=1)
            c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
            h = (o + p_o * c).sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, dim=1), c
