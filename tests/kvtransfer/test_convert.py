"""What goes into a message comes out of it."""

import math
import struct

from hypothesis import given
from hypothesis import strategies as st
from tandem.v1 import inference_pb2

from engine.batch import KVLayout, Sampled
from engine.request import Receipt
from engine.sampling import MAX_LOGIT_BIAS, MAX_STOPS, SamplingParams
from engine.structure import Structure
from kvtransfer import convert

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, (1 << 32) - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100, width=32),
    top_k=st.integers(-1, (1 << 31) - 1),
    top_p=st.integers(1, 1000).map(lambda mille: mille / 1000),
    min_p=st.floats(0, 1, width=32),
    repetition_penalty=st.floats(0, 100, width=32, exclude_min=True),
    presence_penalty=st.floats(-2, 2, width=32),
    frequency_penalty=st.floats(-2, 2, width=32),
    logit_bias=st.dictionaries(COUNT, st.floats(-100, 100, width=32), max_size=MAX_LOGIT_BIAS).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
    seed=st.none() | st.integers(-(1 << 63), (1 << 63) - 1),
    n=st.integers(1, 64),
    max_tokens=st.integers(1, 1 << 31),
    min_tokens=COUNT,
    stop=st.lists(st.text(), max_size=MAX_STOPS).map(tuple),
    stop_token_ids=st.lists(COUNT, max_size=MAX_STOPS).map(tuple),
    ignore_eos=st.booleans(),
    include_stop_str_in_output=st.booleans(),
    skip_special_tokens=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    structure=st.none() | st.builds(Structure, st.text(), st.text()),
)


def on_the_wire(params: SamplingParams) -> SamplingParams:
    message = inference_pb2.SamplingParams.FromString(convert.params_to_proto(params).SerializeToString())
    return convert.params_from_proto(message)


@given(PARAMS)
def test_sampling_params_round_trip(params):
    arrived = on_the_wire(params)
    assert on_the_wire(arrived) == arrived, "a second hop changes nothing"
    for name in SamplingParams.__dataclass_fields__:
        if name not in ("top_p", "logit_bias"):
            sent = getattr(params, name)
            got = getattr(arrived, name)
            # The shortest decimal of a float32 is the same float32.
            assert got == sent or struct.pack("<f", got) == struct.pack("<f", sent), name
    assert arrived.top_p == params.top_p, "a decimal of few digits survives exactly"
    assert [token_id for token_id, _ in arrived.logit_bias] == [token_id for token_id, _ in params.logit_bias]


def test_unset_fields_keep_their_defaults_and_zero_is_not_unset():
    assert convert.params_from_proto(inference_pb2.SamplingParams()) == SamplingParams()
    zero = inference_pb2.SamplingParams(temperature=0, skip_special_tokens=False, logprobs=0, seed=0, max_tokens=0)
    params = convert.params_from_proto(zero)
    assert (params.temperature, params.skip_special_tokens, params.logprobs, params.seed) == (0.0, False, 0, 0)
    assert params.max_tokens == 0


def test_the_largest_top_k_fits_its_field():
    assert on_the_wire(SamplingParams(top_k=1 << 31)).top_k == (1 << 31) - 1


@given(st.floats(width=32))
def test_shortest_is_the_same_float32(value):
    short = convert.shortest(value)
    assert math.isnan(short) if math.isnan(value) else struct.pack("<f", short) == struct.pack("<f", value)


@given(st.floats(-1000, 1000))
def test_shortest_is_the_same_after_any_number_of_hops(value):
    once = convert.shortest(struct.unpack("<f", struct.pack("<f", value))[0])
    twice = convert.shortest(struct.unpack("<f", struct.pack("<f", once))[0])
    assert once == twice


@given(COUNT, FLOAT32, st.lists(st.tuples(COUNT, FLOAT32)).map(tuple))
def test_sampled_round_trip(token_id, logprob, top):
    token = Sampled(token_id, logprob, top)
    assert convert.sampled_from_proto(convert.sampled_to_proto(token)) == token


def test_layout_round_trip():
    layout = KVLayout("m", 30, 3, 64, "bfloat16", 16, 1000)
    assert convert.layout_from_proto(convert.layout_to_proto(layout)) == layout


def test_receipt_round_trip():
    receipt = Receipt(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1 << 40, 9, 10, 11, "p0", "d0")
    assert convert.receipt_from_proto(convert.receipt_to_proto(receipt)) == receipt
