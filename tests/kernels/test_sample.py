import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dsv3_kernels import sample
from dsv3_kernels._triton import tl, triton
from dsv3_kernels.ops.philox import gumbel, philox, to_uniform, uniform_block
from dsv3_kernels.ops.sample import RowParams, _keep_likeliest, launch_sample
from dsv3_kernels.testing import assert_bitwise_equal

EULER = 0.5772156649


def draw(
    logits: Tensor,
    seeds: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    position: int | Tensor = 0,
    answer: int | Tensor = 0,
) -> Tensor:
    """Sample once per seed from the same logits."""
    B = len(seeds)
    params = RowParams(
        temperature_B=torch.full((B,), temperature),
        top_k_B=torch.full((B,), top_k),
        top_p_B=torch.full((B,), top_p),
        min_p_B=torch.full((B,), min_p),
        seed_B=seeds,
        answer_B=torch.as_tensor(answer).expand(B),
        position_B=torch.as_tensor(position).expand(B),
    )
    return sample(logits.expand(B, -1).contiguous(), params)


def some_rows(params: RowParams, rows: slice | Tensor) -> RowParams:
    return RowParams(**{f.name: getattr(params, f.name)[rows] for f in fields(params)})


def kept(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """The tokens that may be drawn, with their probabilities: min-p, top-k, then top-p."""
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    share = [math.exp(x) / sum(map(math.exp, scaled)) for x in scaled]
    order = [i for i in order if share[i] >= min_p * max(share)]
    order = order[: top_k or None]
    p = {i: math.exp(scaled[i]) for i in order}
    p = {i: x / sum(p.values()) for i, x in p.items()}
    chosen, total = {}, 0.0
    for i in order:
        if total >= top_p:
            break
        chosen[i] = p[i]
        total += p[i]
    return {i: x / sum(chosen.values()) for i, x in chosen.items()}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        # Random123's two other vectors need a counter word that ours leaves at zero; these two
        # hold all 32 bits of the other words, both key words and the carries of the products.
        ((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), -1, None),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E), 0x299F31D0A4093822, None),
    ],
)
def test_philox(counter: tuple[int, int, int], key: int, words: str | None) -> None:
    block, position, answer = (torch.tensor([word]) for word in counter)
    got = philox(torch.tensor([key]), position, answer, block)
    want = philox_by_hand((*counter, 0), (key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF))
    assert [f"{w:08x}" for w in got[0, 0].tolist()] == [f"{w:08x}" for w in want]
    assert words is None or [f"{w:08x}" for w in want] == words.split()


def philox_by_hand(c: tuple[int, ...], k: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers."""
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (p1 >> 32 ^ c[1] ^ k[0], p1 & 2**32 - 1, p0 >> 32 ^ c[3] ^ k[1], p0 & 2**32 - 1)
        k = ((k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32)
    return c


def test_philox_by_hand_has_the_published_answers() -> None:
    """The known-answer vectors of Random123."""
    ones = philox_by_hand((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
    assert ones == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    digits = philox_by_hand(pi, (0xA4093822, 0x299F31D0))
    assert digits == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_gumbel_noise() -> None:
    zeros = torch.zeros(64, dtype=torch.int64)
    noise = gumbel(torch.arange(64), zeros, zeros, 1001).double()
    assert bool(noise.isfinite().all())
    assert noise.mean() == pytest.approx(EULER, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.03)
    middle = noise.flatten().median()
    assert middle == pytest.approx(-math.log(math.log(2)), abs=0.02)


def test_every_part_of_the_counter_counts() -> None:
    """Seeds that differ in one bit, positions, answers and ids all get their own noise."""
    seeds = torch.tensor([5, 4, 6, 5 + 2**32, 5 - 2**63, -5])
    zero, one = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    noise, later = gumbel(seeds, zero, zero, 64), gumbel(seeds, one, zero, 64)
    others = (
        gumbel(seeds, zero, one, 64),
        gumbel(seeds, one, one, 64),
        gumbel(seeds, zero, 2 * one, 64),
    )
    everything = torch.cat((noise, later, *others)).flatten()
    assert len(everything.unique()) == len(everything)
    # The noise of an id does not depend on the vocabulary's size.
    assert torch.equal(gumbel(seeds, zero, zero, 13), noise[:, :13])


# temperature, top-k, top-p, min-p
CASES = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.3, 5, 1.0, 0.0),
    (1.0, 7, 0.8, 0.0),
    (2.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 0.2),
    (2.0, 6, 1.0, 0.3),
    (0.8, 0, 0.7, 0.1),
    (1.5, 7, 0.9, 0.25),
    (1.0, 0, 1.0, 1.0),
]


@pytest.mark.parametrize("along", ["seeds", "positions", "answers"])
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), CASES)
def test_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float, along: str
) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(12), 8000
    one = torch.full((draws,), 77)
    seed, position, answer = (
        torch.arange(draws) if along == name else one for name in ("seeds", "positions", "answers")
    )
    token = draw(logits, seed, temperature, top_k, top_p, min_p, position, answer)
    seen = token.bincount(minlength=12).tolist()
    p = kept(logits.tolist(), temperature, top_k, top_p, min_p)
    assert {i for i, n in enumerate(seen) if n} == set(p)
    # Chi-square: mean df, variance 2 df; six standard deviations above is never by chance.
    chi2 = sum((seen[i] - draws * x) ** 2 / (draws * x) for i, x in p.items())
    df = len(p) - 1
    assert chi2 <= df + 6 * math.sqrt(2 * df)


def test_ties_at_the_cut_keep_the_lowest_ids() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    seeds = torch.arange(2000)
    assert set(draw(logits, seeds, top_k=2).tolist()) == {1, 3}
    assert set(draw(logits, seeds, top_k=5).tolist()) == {1, 2, 3, 4, 5}
    assert set(draw(torch.zeros(9), seeds, top_p=0.3).tolist()) == {0, 1, 2}


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [300, 700, 999]] = 5.0
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    params = RowParams(torch.zeros(1), zero, one, one, zero, zero, zero)
    assert sample(logits, params).item() == 300


def test_tiny_temperatures_are_greedy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(100) * 20
    for temperature in (1e-3, 1e-30, 1e-38):
        token = draw(logits, torch.arange(50), temperature, 0, 1.0)
        assert bool((token == logits.argmax()).all()), temperature
        assert torch.equal(draw(logits, torch.arange(50), temperature, 50, 0.9), token)


def test_a_row_does_not_see_its_neighbours() -> None:
    """Whatever else is in the batch, and wherever a row lies in it."""
    torch.manual_seed(0)
    B, W = 60, 331
    logits = torch.randn(B, W) * 2
    temperature = torch.tensor([0.0, 0.6, 1.0, 1.5]).repeat(15)
    top_k = torch.tensor([0, 0, 3, 50, 400]).repeat(12)
    top_p = torch.tensor([1.0, 0.9, 0.5]).repeat(20)
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.4]).repeat_interleave(15)
    seed, position = torch.randint(-(2**62), 2**62, (B,)), torch.arange(B) % 7
    params = RowParams(temperature, top_k, top_p, min_p, seed, position % 3, position)
    together = sample(logits, params)
    ones = [slice(b, b + 1) for b in range(B)]
    alone = torch.cat([sample(logits[one], some_rows(params, one)) for one in ones])
    assert torch.equal(together, alone)
    order = torch.randperm(B)
    assert torch.equal(sample(logits[order], some_rows(params, order)), together[order])


def test_a_row_that_keeps_all_keeps_all_beside_one_that_does_not() -> None:
    """The first token's probability rounds to 1; the others stay possible."""
    logits = torch.tensor([[30.0, 0.0, -1.0]]).expand(2, -1)
    got = _keep_likeliest(logits, torch.tensor([0, 2]), torch.tensor([1.0, 1.0]))
    assert got.tolist() == [[30.0, 0.0, -1.0], [30.0, 0.0, -math.inf]]


def both(
    logits: Tensor,
    temperature: list[float],
    top_k: list[int],
    top_p: list[float],
    min_p: tuple[float, ...] = (0.0,),
):
    """Tokens of the reference and of the kernel, rows with these parameters in turn."""
    B = len(logits)
    rows = torch.arange(B)
    params = RowParams(
        temperature_B=torch.tensor(temperature)[rows % len(temperature)],
        top_k_B=torch.tensor(top_k)[rows % len(top_k)],
        top_p_B=torch.tensor(top_p)[rows % len(top_p)],
        min_p_B=torch.tensor(min_p)[rows % len(min_p)],
        seed_B=rows * 0x1234567_89ABCDEF - 2**62,
        answer_B=rows % 3,
        position_B=rows * 1_000_003,
    )
    got = launch_sample(logits, params, block=1024, near=2048)
    # Where the likeliest tokens are too many to be copied, they are selected in the row.
    in_row = launch_sample(logits, params, block=1024, near=16)
    assert_bitwise_equal("tokens", got, in_row)
    return sample.reference(logits, params), got, params


@pytest.mark.parametrize(("vocab", "rows"), [(1, 3), (331, 15), (1100, 3)])
def test_kernel_chooses_as_the_reference(vocab: int, rows: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab + 2)[:, :vocab] * 4
    want, got, _ = both(logits, [0.7, 0.0, 1.5], [0, 5, 0, 1, 331], [1.0, 0.9, 0.3, 1e-9])
    assert got.tolist() == want.tolist()
    assert vocab == 1 or len(set(want.tolist())) > rows // 2


@pytest.mark.parametrize(("vocab", "rows"), [(1, 2), (67, 40), (331, 24), (2100, 4)])
def test_kernel_drops_what_is_below_min_p(vocab: int, rows: int) -> None:
    """Alone, and before top-k and top-p."""
    torch.manual_seed(3)
    logits = torch.randn(rows, vocab + 2)[:, :vocab] * 2
    top_k, top_p = [0, 0, 5, 331], [1.0, 1.0, 1.0, 0.6, 0.9]
    want, got, params = both(logits, [2.0, 1.0, 0.0], top_k, top_p, (0.3, 0.0, 0.05, 1.0))
    assert got.tolist() == want.tolist()
    everything = sample.reference(logits, replace(params, min_p_B=torch.zeros(rows)))
    assert vocab == 1 or everything.tolist() != want.tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 0.6), (30, 1.0), (250, 1.0), (0, 0.6)])
def test_kernel_keeps_the_lowest_of_equal_logits(top_k: int, top_p: float) -> None:
    """Logits of few values; two tokens in five are impossible."""
    torch.manual_seed(1)
    logits = torch.randint(0, 3, (6, 300)).float()
    logits[:, torch.randperm(300)[:120]] = -math.inf
    want, got, _ = both(logits, [1.0], [top_k], [top_p])
    assert got.tolist() == want.tolist()
    assert len(set(want.tolist())) > 1


def test_kernel_rows_do_not_see_each_other() -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 331)
    _, got, params = both(logits, [0.9], [0, 7], [0.8, 1.0])
    for b in range(3):
        one = slice(b, b + 1)
        alone = launch_sample(logits[one], some_rows(params, one), block=1024, near=2048)
        assert alone.tolist() == got[b : b + 1].tolist()


def test_kernel_greedy_ties_and_empty_batches() -> None:
    logits = torch.zeros(2, 1000)
    logits[0, [300, 700, 999]] = 5.0
    _, got, params = both(logits, [0.0], [0], [1.0])
    assert got.tolist() == [300, 0]
    assert sample.kernel(logits[:0], some_rows(params, slice(0))).shape == (0,)


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, position_ptr, answer_ptr, BLOCK: tl.constexpr):
    b, first = tl.program_id(0), tl.program_id(1) * BLOCK
    seed, position = tl.load(seed_ptr + b), tl.load(position_ptr + b)
    answer = tl.load(answer_ptr + b)
    at = out_ptr + b * tl.num_programs(1) * BLOCK + first + tl.arange(0, BLOCK)
    tl.store(at, uniform_block(seed, position, answer, first, BLOCK))


def test_kernel_draws_the_same_numbers() -> None:
    seed = torch.tensor([0, -1, 0x299F31D0A4093822, 5 - 2**63])
    position = torch.tensor([0, 163_839, 7, 2**31])
    answer = torch.tensor([0, 1, 127, 2**31 - 1])
    out = torch.empty(4, 512)
    _uniform_kernel[(4, 4)](out, seed, position, answer, 128)
    want = to_uniform(philox(seed, position, answer, torch.arange(128)).flatten(1))
    assert_bitwise_equal("uniform", out, want)
