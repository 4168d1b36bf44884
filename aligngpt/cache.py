"""The generation engine's key-value cache: a row for each request that is being answered, each with its own length.

transformers' `StaticCache` has one length for all rows; here every forward says where its keys go. Token i's are key
`place[i]` of row `row[i]`, whether the tokens are those of packed prompts (prefill) or one new token of each row
(decoding). In prefill a layer gets back what it handed over, since prompts attend to themselves alone; in decoding it
gets the rows themselves, and attention has to know how much of each is in use.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Where:
    """Where the keys of the next forward go; the layers of a cache share one."""

    row: Tensor  # (tokens,)
    place: Tensor  # (tokens,)
    visible: int | None  # keys of a row that layers are shown in decoding; None: this is prefill


class _Layer(CacheLayerMixin):
    is_compileable = True
    is_sliding = False

    def __init__(self, where: _Where, num_rows: int, max_length: int):
        super().__init__()
        self.where, self.num_rows, self.max_length = where, num_rows, max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(states: Tensor) -> Tensor:
            return states.new_zeros(self.num_rows, states.shape[1], self.max_length, states.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        where = self.where
        row, place = where.row.to(self.device), where.place.to(self.device)  # layers may lie on several devices
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            # packed (1, H, T, D) or one token a row (B, H, 1, D) -> (tokens, H, D)
            room[row, :, place] = states.transpose(1, 2).flatten(0, 1)
        if where.visible is None:
            return key_states, value_states
        rows = key_states.shape[0]
        return self.keys[:rows, :, : where.visible], self.values[:rows, :, : where.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # a mask is only made in prefill

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.max_length


class SlotCache(Cache):
    """`num_rows` rows of up to `max_length` keys and values in each layer, allocated when first used."""

    def __init__(self, num_layers: int, num_rows: int, max_length: int):
        self.where = _Where()
        super().__init__(layers=[_Layer(self.where, num_rows, max_length) for _ in range(num_layers)])

    def prefill(self, row: Tensor, place: Tensor) -> None:  # (T,), (T,)
        """The next forward reads packed prompts."""
        self.where.row, self.where.place, self.where.visible = row, place, None

    def decode(self, row: Tensor, place: Tensor, visible: int) -> None:  # (B,) 0 to B - 1, (B,)
        """The next forward reads a token of each of the first B rows; `visible` is above the largest place in use."""
        self.where.row, self.where.place, self.where.visible = row, place, visible
