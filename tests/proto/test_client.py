"""The typed client against the real service, and against nothing but its own two libraries."""

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from tandem.client import Client, GenerateChunk, GenerateComplete

from cluster.inference_server import DESCRIPTOR, inference_service
from engine.errors import Unauthenticated
from kvtransfer.rpc_handlers import refusal
from kvtransfer.rpc_server import RpcService, start_server
from tests.cluster.fake_decode import FakeDecode
from tests.cluster.serving import ANSWER, LENGTH, TOKENIZER
from tests.cluster.serving import serving as serving_gateway

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def serving(answer=ANSWER) -> AsyncIterator[tuple[Client, FakeDecode]]:
    fake = FakeDecode(answer)
    async with serving_gateway(fake) as gateway:
        server = await start_server("127.0.0.1:0", [inference_service(gateway)])
        async with Client(server.address, timeout_s=20) as client:
            yield client, fake
        await server.stop()


async def test_generate_streams():
    async with serving() as (client, fake):
        parts = [part async for part in client.generate("hello", max_tokens=LENGTH, seed=3, cache_salt="s")]
        ((_, submit),) = fake.submits
    *chunks, complete = parts
    assert all(isinstance(chunk, GenerateChunk) for chunk in chunks)
    assert isinstance(complete, GenerateComplete)
    assert "".join(chunk.text for chunk in chunks) == complete.choices[0].text == "One, two, three."
    assert (submit.seed, submit.salt, submit.params.max_tokens) == (3, b"s", LENGTH)


@pytest.mark.parametrize("prompt", ["hello", [1, 2, 3], (4,)])
async def test_complete_takes_every_kind_of_prompt(prompt):
    async with serving() as (client, fake):
        complete = await client.complete(prompt, max_tokens=2, stop=["zzz"], logit_bias={5: 1.0}, temperature=0)
        ((_, submit),) = fake.submits
    assert complete.choices[0].finish_reason == "length"
    assert submit.token_ids == (tuple(TOKENIZER.encode(prompt)) if isinstance(prompt, str) else tuple(prompt))
    assert (submit.params.stop, submit.params.temperature) == (("zzz",), 0.0)


async def test_a_chat_is_sent_as_messages():
    async with serving() as (client, _):
        chat = [{"role": "user", "content": "hello"}]
        for ask in (client.complete, client.tokenize):
            # The tiny tokenizer has no chat template, and says so: the messages have arrived.
            with pytest.raises(grpc.aio.AioRpcError, match="no chat template"):
                await ask(chat)


async def test_an_empty_prompt_is_refused_by_the_server():
    async with serving() as (client, _):
        for prompt in ("", [], ()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.complete(prompt)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_leaving_early_cancels():
    async with serving(ANSWER * 40) as (client, fake), aclosing(client.generate("hello", max_tokens=500)) as parts:
        await anext(parts)
        assert fake.running
    # Leaving `serving` fails when the worker still runs it.


async def test_a_deadline_of_its_own():
    async with serving(ANSWER * 40) as (client, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.complete("hello", max_tokens=500, timeout_s=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_other_calls():
    async with serving() as (client, _):
        assert (await client.get_model()).model == "tiny"
        assert len((await client.status()).workers) == 2
        token_ids = await client.tokenize("the é")
        assert token_ids == TOKENIZER.encode("the é")
        assert await client.detokenize(token_ids) == "the é"
        assert await client.detokenize([0], skip_special_tokens=False) == "<|end|>"


async def test_a_key_goes_with_every_call():
    seen = []

    def choose(metadata):
        seen.extend(value for name, value in metadata if name == "authorization")
        return refusal(Unauthenticated("no", ""))

    service = RpcService(DESCRIPTOR, {method.name: choose for method in DESCRIPTOR.methods})
    server = await start_server("127.0.0.1:0", [service])
    async with Client(server.address, api_key="the-key", timeout_s=20) as client:
        calls = (
            client.complete("x"),
            client.get_model(),
            client.tokenize("x"),
            client.detokenize([1]),
            client.status(),
        )
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError):
                await call
    await server.stop()
    assert seen == ["Bearer the-key"] * 5


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/tmp/socket"])
async def test_a_key_may_go_to_this_machine(address):
    async with Client(address, api_key="the-key"):
        pass


async def test_a_key_may_go_anywhere_encrypted():
    async with Client("10.0.0.1:1", api_key="the-key", ca=b"certificates"):
        pass


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("10.0.0.1:1", "the-key"),
        ("example.org:1", "the-key"),
        ("[2001:db8::1]:1", "the-key"),
        ("dns:///localhost:1", "the-key"),
        ("127.0.0.1:1", "the-key\n"),
        ("127.0.0.1:1", "the key"),
        ("127.0.0.1:1", "the-kéy"),
    ],
)
def test_a_key_that_cannot_be_or_would_go_out_in_clear_is_not_taken(address, key):
    with pytest.raises(ValueError, match="key") as caught:
        Client(address, api_key=key)
    assert key not in str(caught.value)


def test_it_needs_nothing_but_the_stubs():
    code = """
import sys, tandem.client
ours = {"kernels", "engine", "kvtransfer", "prefill_worker", "decode_worker", "cluster", "bench", "torch", "ray"}
assert not ours & {name.partition(".")[0] for name in sys.modules}, ours & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", env={"PYTHONPATH": str(ROOT / "proto")})
