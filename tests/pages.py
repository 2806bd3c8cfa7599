"""Keys and values of sequences in pages, as serving engines keep them."""

import torch
from reference_sequences import rows_of

LAYOUTS = ["nhd", "hnd", "apart"]
NO_PAGES = (-1, 2**31 - 1)  # for entries of a table that must not be read


class Pages:
    """Caches (pages, page_size, heads, head_dim) for sequences with these numbers of keys. They
    hold NaN except for rows that `write` has set. Pages are assigned in random order, and three are
    unused.

    Layouts: K and V are halves of one row (`nhd`), with the heads before the rows (`hnd`), or
    tensors of their own (`apart`).
    """

    def __init__(self, lengths, num_heads, head_dim, dtype, page_size, *, layout="nhd", seed=0):
        self.page_size = page_size
        counts = [-(-length // page_size) for length in lengths]
        num_pages = sum(counts) + 3
        sizes = {
            "nhd": (num_pages, page_size, num_heads, 2 * head_dim),
            "hnd": (num_pages, num_heads, page_size, 2 * head_dim),
            "apart": (num_pages, page_size, num_heads, 2, head_dim),
        }
        rows = torch.full(sizes[layout], torch.nan, dtype=dtype)
        if layout == "apart":
            self.k, self.v = (x.contiguous() for x in rows.unbind(3))
        else:
            rows = rows.transpose(1, 2) if layout == "hnd" else rows
            self.k, self.v = rows.split(head_dim, 3)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(num_pages, generator=generator).int()[: sum(counts)]
        self.table = torch.empty(len(counts), max(counts, default=0) + 2, dtype=torch.int32)
        self.table[:, ::2], self.table[:, 1::2] = NO_PAGES
        for n, own in enumerate(order.split(counts)):
            self.table[n, : len(own)] = own

    @property
    def block_table(self):
        return self.table.to(self.k.device)

    def write(self, sequence, first, k, v):
        """Writes keys and values (tokens, heads, head_dim), starting at row `first` of the
        sequence."""
        rows = self._rows(sequence, first, first + len(k))
        self.k[rows], self.v[rows] = k.to(self.k), v.to(self.v)

    def read(self, sequence, first, end):
        rows = self._rows(sequence, first, end)
        return self.k[rows], self.v[rows]

    def clone(self, device=None):
        """A copy of the caches with the same strides."""
        other = object.__new__(Pages)
        other.page_size, other.table = self.page_size, self.table.clone()
        other.k, other.v = (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
            for x in (self.k, self.v)
        )
        return other

    def _rows(self, sequence, first, end):
        pages, rows = rows_of(self.table[sequence], end, self.page_size)
        return pages[first:], rows[first:]


def cu_seqlens(lengths, dtype=torch.int32):
    """0, and the cumulative sums of the lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)
