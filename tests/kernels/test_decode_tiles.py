import pytest

from dsv3_kernels.attention._decode_tiles import _SPLIT_BYTES, pool_for, programs_for, split_for


@pytest.mark.parametrize("fit", [1, 2, 3, 7, 20, 1000])
@pytest.mark.parametrize("splits", [2, 9, 160])
@pytest.mark.parametrize("sequences", [1, 4, 64])
def test_parts_of_any_contexts_fit_the_pool(sequences: int, splits: int, fit: int) -> None:
    values = _SPLIT_BYTES // (4 * fit)
    fixed = pool_for(sequences, splits, values, is_fixed=True)
    assert fixed.spare == 0 and fixed.parts == fixed.sequences * splits
    assert fixed.sequences == 1 or fixed.parts <= fit
    pool = pool_for(sequences, splits, values, is_fixed=False)
    assert pool.parts <= max(2, fit) or pool.sequences == 1
    if 2 * sequences <= fit:
        assert pool.sequences == sequences, "one launch"
    if pool.spare:
        for long in range(pool.sequences + 1):
            held = long * [512 * splits] + (pool.sequences - long) * [1]
            split = 512 * max(1, -(-sum(held) // (512 * pool.spare)))
            assert sum(-(-n // split) for n in held) <= pool.parts
    else:
        assert pool.parts == pool.sequences * splits


def test_splits_are_short_where_a_gpu_would_be_idle() -> None:
    alone, many = (split_for(512, programs, 2048, 132) for programs in (1, 128))
    assert (alone, many) == (64, 512)
    assert split_for(512, 1, 16384, 132) == 128 and split_for(1024, 2, 65536, 132) == 1024
    assert split_for(1024, 1, 10**6, 132) == 1024 and split_for(512, 1, 1, 132) == 64


def test_short_sequences_that_keep_a_gpu_busy_are_not_split() -> None:
    """2,048 selected slots of each of a prompt's queries; a decode step has too few of them."""
    assert split_for(512, 2048, 2048, 132) == 2048 and split_for(512, 128, 2048, 132) == 512
    assert split_for(512, 2048, 4096, 132) == 512, "longer ones are"


def test_programs_of_many_sequences_fit_a_grid() -> None:
    """As of the queries of a prompt of 70,000 tokens that attend to selected slots."""
    assert programs_for(70_000, 1, 70_000) == 65_535
    assert programs_for(9, 4, 3) == 9 and programs_for(10**6, 4, 300) == 300
