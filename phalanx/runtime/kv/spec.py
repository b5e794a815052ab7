"""The sizes every part of the KV metadata agrees on."""

from dataclasses import dataclass

from phalanx.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """Shape of one domain's device pool, equal on all of its ranks.

    block_size: tokens per block.
    num_blocks: blocks of the pool, the null block 0 included (so one less can hold tokens).
    max_model_len: tokens a sequence may have, prompt and output together.

    Raises:
        ConfigError: a size that is not positive, or a pool in which the longest sequence could never run.
    """

    block_size: int
    num_blocks: int
    max_model_len: int

    def __post_init__(self) -> None:
        for name, value, least in (
            ("block_size", self.block_size, 1),
            ("num_blocks", self.num_blocks, 2),
            ("max_model_len", self.max_model_len, 1),
        ):
            if value < least:
                raise ConfigError(f"kv {name} ({value}) is below {least}; use {least} or more")
        if self.capacity_tokens < self.max_model_len:
            needed = self.max_blocks(self.max_model_len) + 1
            raise ConfigError(
                f"kv num_blocks ({self.num_blocks}, one of them the null block) is too small for one sequence of "
                f"max_model_len ({self.max_model_len}) tokens in blocks of {self.block_size}: raise num_blocks to "
                f"{needed} or lower max_model_len to {self.capacity_tokens}"
            )

    def max_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens of one sequence need.

        Pool sizing and admission both ask here: two formulas that differ by one block are a deadlock.
        """
        return -(-num_tokens // self.block_size)

    @property
    def capacity_tokens(self) -> int:
        """Tokens one sequence can hold at most, by its length limit and by the pool."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)
