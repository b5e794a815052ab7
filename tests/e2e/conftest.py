"""What several end-to-end modules share, because it takes seconds to make."""

import pytest

from tests.support.oracle import Oracle, make_oracle


@pytest.fixture(scope="session")
def moe_oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Answers of transformers on a tiny qwen3_moe checkpoint: 6 experts, 3 MoE layers."""
    return make_oracle("qwen3_moe", tmp_path_factory.mktemp("moe"))
