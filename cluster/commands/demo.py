"""`tandem demo`: a whole service on this machine, three different requests at once, and where their time went."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from importlib.resources import files

from rich.console import Console
from rich.live import Live
from tandem.client import Client, Sampling

from cluster.calls import Result, RunningRequest
from cluster.commands.demo_screen import Lines, Pane, SideBySide, receipt_table
from cluster.commands.generate import raise_first
from cluster.config import TandemConfig
from cluster.progress import Progress
from cluster.prompt_file import PromptLine
from cluster.service import running_service

REFRESH_S = 0.125
# Title, file in demo_prompts/, whether it is a chat message, longest answer.
REQUESTS = (("chat", "chat.txt", True, 80), ("code", "code.txt", False, 64), ("document", "document.txt", True, 64))


async def show_demo(config: TandemConfig) -> None:
    """Starts the service, streams the answers, prints the receipts and shuts down. Raises TandemErrors."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    console = Console(highlight=False)
    progress = Progress(console)
    stop_s = start_s
    async with running_service(config, progress) as service:
        lines = demo_prompts()
        results = await _stream(console, service.address, lines)
        raise_first(results)
        answers = [(str(result.line.id), result.answer) for result in results if result.answer is not None]
        console.print(receipt_table(answers))
        progress.line("shutting down ...")
        stop_s = loop.time()
    now = loop.time()
    progress.line(f"shutting down: {now - stop_s:.1f} s; all of it: {now - start_s:.1f} s")


def demo_prompts() -> list[PromptLine]:
    """A chat question, a piece of code to complete, and a scene of some 3,000 tokens to sum up."""
    folder = files("cluster.commands") / "demo_prompts"
    lines = []
    for title, name, is_chat, max_tokens in REQUESTS:
        text = (folder / name).read_text(encoding="utf-8")
        # Code goes on where it stops, after its last newline; a question has none.
        prompt = (("user", text.strip()),) if is_chat else text
        lines.append(PromptLine(title, prompt, max_tokens, where=name))
    return lines


async def _stream(console: Console, address: str, lines: Sequence[PromptLine]) -> list[Result]:
    """Sends everything at once and shows the answers as they come."""
    panes = [Pane(str(line.id), _opening(line)) for line in lines]
    async with Client(address) as client, AsyncExitStack() as stack:
        requests = [RunningRequest(client, address, line, _sampling(line)) for line in lines]
        for request in requests:
            stack.push_async_callback(request.cancel)
        if not console.is_terminal:
            printer = Lines(lambda line: console.print(line, markup=False, soft_wrap=True))
            return await _follow_all(requests, panes, printer.add, lambda pane: printer.end(pane.title, pane.status))
        screen = SideBySide(panes)
        with Live(screen, console=console, auto_refresh=False) as live:
            ticker = asyncio.create_task(_refresh(live, panes))
            try:
                return await _follow_all(requests, panes, lambda title, text: None, lambda pane: None)
            finally:
                ticker.cancel()
                await asyncio.wait([ticker])


async def _follow_all(
    requests: Sequence[RunningRequest],
    panes: Sequence[Pane],
    on_text: Callable[[str, str], None],
    on_end: Callable[[Pane], None],
) -> list[Result]:
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_follow(request, pane, on_text, on_end))
            for request, pane in zip(requests, panes, strict=True)
        ]
    return [task.result() for task in tasks]


async def _follow(
    request: RunningRequest, pane: Pane, on_text: Callable[[str, str], None], on_end: Callable[[Pane], None]
) -> Result:
    """Keeps `pane` up to date with one request."""
    loop = asyncio.get_running_loop()
    sent_s = loop.time()
    first = ""
    tokens = 0
    async for chunk in request.chunks():
        first = first or f"first {loop.time() - sent_s:.1f} s"
        pane.is_waiting = False
        tokens += len(chunk.token_ids)
        pane.text += chunk.text
        pane.status = f"{first} · {tokens} tok"
        on_text(pane.title, chunk.text)
    result = await request.result()
    pane.color = "red" if result.error is not None else "green"
    on_end(pane)
    return result


async def _refresh(live: Live, panes: Sequence[Pane]) -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    while True:
        for pane in panes:
            if pane.is_waiting:
                pane.status = f"waiting {loop.time() - start_s:.1f} s"
        live.refresh()
        await asyncio.sleep(REFRESH_S)


def _opening(line: PromptLine) -> str:
    """The beginning of the prompt, on one line: the pane cuts it."""
    text = (
        line.prompt
        if isinstance(line.prompt, str)
        else "".join(str(turn[1]) for turn in line.prompt if isinstance(turn, tuple))
    )
    return " ".join(text[:200].split())


def _sampling(line: PromptLine) -> Sampling:
    sampling = Sampling(temperature=0.0)
    if line.max_tokens is not None:
        sampling["max_tokens"] = line.max_tokens
    return sampling
