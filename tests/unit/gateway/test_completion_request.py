"""Completion requests, the older form: what is read, what is refused, and by which name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import InvalidArgument
from services.gateway.http.completion_request import read_completion


def read(**fields: object):
    return read_completion(json.dumps({"model": "m", "prompt": "Once", **fields}).encode())


def test_all_parameters_arrive():
    call = read(
        max_tokens=7, temperature=0, n=2, best_of=2, logprobs=3, stop=["a", "b"], suffix="", user="u", seed=None,
        logit_bias={"5": -100}, min_tokens=1, ignore_eos=True, min_p=0.5, repetition_penalty=1.5, stream=True,
        stream_options={"include_usage": True, "include_obfuscation": None}, echo=False,
    )  # fmt: skip
    sampling = call.sampling
    assert (call.model, call.prompt, call.echo) == ("m", "Once", "")
    assert (sampling.output_tokens_max, sampling.choices, sampling.top_logprobs) == (7, 2, 3)
    assert (dict(sampling.logit_bias), list(sampling.stop)) == ({5: -100.0}, ["a", "b"])
    assert (sampling.output_tokens_min, sampling.ignore_eos) == (1, True)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.5, 1.5)
    assert call.stream and call.include_usage and call.logprobs


def test_what_is_not_given_stays_unset_but_for_the_length_that_this_form_always_had():
    call = read(prompt=["Once"], n=1, logprobs=False)
    assert {field.name for field, _ in call.sampling.ListFields()} == {"output_tokens_max"}
    assert call.sampling.output_tokens_max == 16
    assert call.prompt == "Once"
    assert not (call.stream or call.include_usage or call.logprobs or call.echo)
    assert read(echo=True).echo == "Once"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": "\0"}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"tools": []}, "tools"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0664": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"logit_bias": []}, "logit_bias"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields, param):
    with pytest.raises(InvalidArgument) as told:
        read(**fields)
    assert told.value.violations[0].field == param


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_no_body_breaks_it(body):
    with pytest.raises(InvalidArgument):
        read_completion(body)
