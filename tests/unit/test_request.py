"""Sampling parameters of scripts: read where the meaning is plain, else refused by name."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from dsv3.errors import RequestError
from dsv3.request import SamplingParams


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("stop", "latent", ("latent",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", np.array(["a", "b"]), ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", 7, (7,)),
        ("stop_token_ids", [7, 8.0], (7, 8)),
        ("stop_token_ids", np.array([7, 8]), (7, 8)),
        ("stop_token_ids", torch.tensor([7, 8]), (7, 8)),
        ("stop_token_ids", [np.int32(7), torch.tensor(8)], (7, 8)),
        ("stop_token_ids", {7}, (7,)),
        ("max_tokens", None, 200),
        ("max_tokens", 5.0, 5),
        ("max_tokens", "5", 5),
        ("max_tokens", np.int64(5), 5),
        ("seed", None, 0),
        ("seed", torch.tensor(9), 9),
        ("temperature", "0.5", 0.5),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 1, 1),
        ("temperature", None, 0.0),
        ("top_k", -1, 0),
        ("top_p", "1e-3", 0.001),
        ("ignore_eos", np.True_, True),
        ("logprobs", None, None),
        ("logprobs", 3.0, 3),
        ("logit_bias", None, {}),
        ("logit_bias", {np.int64(7): np.float64(1.5)}, {7: 1.5}),
        ("logit_bias", {"7": "1.5"}, {7: 1.5}),
        ("n", None, 1),
    ],
)
def test_values_with_a_plain_meaning_are_taken(name: str, given: Any, taken: Any) -> None:
    got = getattr(SamplingParams(**{name: given}), name)
    assert (got, type(got)) == (taken, type(taken))
    assert SamplingParams.of({name: given}) == SamplingParams(**{name: taken})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("max_tokens", 5.5, "max_tokens=5.5 must be a whole number, from 0 to 2147483647"),
        ("max_tokens", True, "max_tokens=True must be a whole number, from 0 to 2147483647"),
        ("max_tokens", math.inf, "max_tokens=inf must be a whole number, from 0 to 2147483647"),
        ("max_tokens", [5], "max_tokens=[5] must be a whole number, from 0 to 2147483647"),
        ("max_tokens", -1, "max_tokens=-1 must be from 0 to 2147483647"),
        ("temperature", "hot", "temperature='hot' must be a number, between 0 and 100"),
        ("temperature", "nan", "temperature='nan' must be between 0 and 100"),
        ("temperature", False, "temperature=False must be a number, between 0 and 100"),
        ("temperature", b"1", "temperature=b'1' must be a number, between 0 and 100"),
        ("temperature", 1j, "temperature=1j must be a number, between 0 and 100"),
        ("top_p", 0, "top_p=0 must be above 0 and at most 1"),
        ("top_k", 2**40, "top_k=1099511627776 must be from 0 to 2147483647 (0 keeps all tokens)"),
        ("seed", "x", f"seed='x' must be a whole number, from {-(2**63)} to {2**63 - 1}"),
        ("seed", 2**63, f"seed={2**63} must be from {-(2**63)} to {2**63 - 1}"),
        ("stop", "", "stop='' must be a text or a list of texts, none empty"),
        ("stop", ["a", ""], "stop=['a', ''] must be a text or a list of texts, none empty"),
        ("stop", b"x", "stop=b'x' must be a text or a list of texts, none empty"),
        ("stop", 5, "stop=5 must be a text or a list of texts, none empty"),
        ("stop", {"a": 1}, "stop={'a': 1} must be a text or a list of texts, none empty"),
        ("stop_token_ids", "7", "stop_token_ids='7' must be a token id or a list of them"),
        ("stop_token_ids", ["7"], "stop_token_ids=['7'] must be a token id or a list of them"),
        ("stop_token_ids", [True], "stop_token_ids=[True] must be a token id or a list of them"),
        ("stop_token_ids", [7.5], "stop_token_ids=[7.5] must be a token id or a list of them"),
        ("ignore_eos", "yes", "ignore_eos='yes' must be True or False"),
        ("ignore_eos", 1, "ignore_eos=1 must be True or False"),
        ("logprobs", True, "logprobs=True must be a whole number, from 0 to 20"),
        ("logprobs", 21, "logprobs=21 must be from 0 to 20"),
        ("n", 0, "n=0 must be from 1 to 128"),
        ("logit_bias", "x", "logit_bias='x' must be a mapping of token ids to numbers"),
        (
            "logit_bias",
            {True: 1},
            "logit_bias[True]=1 must be a token id, and a number between -100 and 100",
        ),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: Any, error: str) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{name: value})
    assert str(refused.value) == error


def test_unknown_parameters_of_a_mapping_are_named() -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams.of({"max_new_tokens": 3})
    error = "params: unknown parameter 'max_new_tokens'; did you mean 'max_tokens'?"
    assert str(refused.value) == error
    with pytest.raises(RequestError, match=r"params: unknown parameters 'a', 5$"):
        SamplingParams.of(cast(dict[str, Any], {"a": 1, 5: 2, "seed": 3}))
