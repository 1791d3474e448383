"""FG, the S&R views feature generator: the same features, scaled differently in each view (method, section 3).

g_k = 2 sigmoid(MLP([z_k ; stopgrad(f)])),  f_k = g_k * f

Shape letters: B rows, V views, Z trigger, C features, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureGenerator(nn.Module):
    """Elementwise gates on f, one for each column. The last layer starts at zero, so every gate starts at 1.

    The first layer is kept as two factors, on z_k and on f, so that the product with f is done once for all views.
    """

    def __init__(self, trigger_dim: int, feature_dim: int, hidden: int) -> None:
        super().__init__()
        self.trigger_layer = nn.Linear(trigger_dim, hidden)
        self.feature_layer = nn.Linear(feature_dim, hidden, bias=False)
        self.gate_layer = nn.Linear(hidden, feature_dim)
        nn.init.zeros_(self.gate_layer.weight)
        nn.init.zeros_(self.gate_layer.bias)

    def forward(self, trigger_BVZ: Tensor, features_BC: Tensor) -> Tensor:
        """f_k of every view: (B, V, C), one view after the other in memory."""
        # Without the stop of the gradient the gates would pull the embeddings towards what is easy to gate.
        shared_BH = self.feature_layer(features_BC.detach())
        hidden_VBH = torch.relu(self.trigger_layer(trigger_BVZ.transpose(0, 1)) + shared_BH)
        half_gates_VBC = torch.sigmoid(self.gate_layer(hidden_VBH))
        # Views first: what all views share is then added and multiplied in long runs, and each view lies in one piece.
        return (half_gates_VBC * (2 * features_BC)).transpose(0, 1)
