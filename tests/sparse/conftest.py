"""Tokens for the tests of caches."""

from __future__ import annotations

import pytest
from caches import HKV, HQ, B, K, T
from dense import qkv
from torch import Tensor


@pytest.fixture
def tokens() -> list[Tensor]:
    return [x.detach() for x in qkv(T, HQ, HKV, K, K, B)]
