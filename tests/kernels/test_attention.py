"""The attention layer over all its kernels gives the references' results."""

import pytest
import torch

from dsv3.cache.layout import CacheLayout
from dsv3.cache.pool import CachePool
from dsv3.engine.runner import BatchBuilder
from dsv3.model.absorb_rule import AbsorbRule
from dsv3.model.attention import MLA
from dsv3.model.rotary import Rotary
from dsv3.settings import CacheForm
from dsv3_kernels import operation
from dsv3_kernels.testing import assert_close
from tests.distributed.layers import CONFIG, CPU, FORMAT, attention_plan, filled
from tests.distributed.ranks import alone

# Sequence -> (context, new tokens), as `attention_plan` takes them; the shorter ones in front.
STEPS = [
    {0: (0, 1), 1: (0, 20)},
    {0: (1, 1), 2: (0, 2), 1: (20, 46)},
    {0: (2, 1), 1: (66, 1), 2: (2, 2)},
]


@pytest.mark.parametrize(("form", "limit"), [("latent", 1), ("latent", 2), ("heads", 1)])
def test_layer(form: CacheForm, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    where = alone()
    layer = filled(MLA(CONFIG, 0, where.layout, where.tp, FORMAT), where)
    rotary = Rotary(CONFIG, CPU)
    layout = CacheLayout.make(CONFIG, form, "tokens", "fp32", 1, 0)
    pools = [CachePool(layout, 60, CPU, where.tp) for _ in range(2)]
    for step in STEPS:
        plan = attention_plan(step, layout)
        batch = BatchBuilder(plan, layout, CPU, AbsorbRule(limit)).build()
        x = torch.randn(len(plan.token_ids), CONFIG.hidden_size)
        outs = []
        for pool, by_kernel in zip(pools, (False, True), strict=True):
            monkeypatch.setattr(operation, "use_triton", lambda _, yes=by_kernel: yes)
            with torch.inference_mode():
                outs.append(layer(x, rotary(batch.position_T), batch, pool.layer(0)))
        assert_close("attention", outs[1], outs[0], 1e-5)
        assert_close("cache", pools[1].planes[0], pools[0].planes[0], 1e-6)
