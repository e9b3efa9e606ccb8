"""The block pool against a model: any order of verbs, on a memory whose every slot says what was written there.

A slot holds (salt, all tokens up to it). So a block that two owners write, a copy that was forgotten, a name that leads
to other content, or a tenant that sees another's blocks all show as a slot with the wrong content.
"""

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from engine.block_pool import BlockPool

# Prompts are beginnings of few texts, so that many share a prefix; drawn by length, so that most are not tiny.
TEXTS = ([0] * 14, [0, 1] * 7, [0] * 7 + [1] * 7)
PROMPTS = st.builds(lambda text, length: text[:length], st.sampled_from(TEXTS), st.integers(0, 14))
OUTPUTS = st.builds(lambda token, length: [token] * length, st.integers(0, 1), st.integers(1, 6))
Slot = tuple[bytes, tuple[int, ...]]


@dataclass
class Owned:
    """What the model knows of one owner. `tokens` are those written; slots up to `reserved` are its own to write."""

    salt: bytes
    tokens: list[int] = field(default_factory=list)
    reserved: int = 0


class PoolMachine(RuleBasedStateMachine):
    owners = Bundle("owners")

    @initialize(
        num_blocks=st.sampled_from([16, 6, 32]),
        block_size=st.sampled_from([2, 4, 1]),
        prefix_cache=st.sampled_from([True, True, False]),
    )
    def start(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_cache)
        self.memory: list[list[Slot | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.model: dict[str, Owned] = {}
        self.count = 0

    @rule(target=owners, prompt=PROMPTS, salt=st.sampled_from([b"", b"", b"x"]))
    def new(self, prompt: list[int], salt: bytes) -> str:
        owner = self.name()
        expected = self.pool.lookup(prompt, salt)
        cached = self.pool.new(owner, prompt, salt)
        assert cached == expected, "lookup promises what new finds"
        assert cached == 0 or cached < len(prompt), "the last token is left to compute"
        assert cached % self.pool.block_size == 0
        self.model[owner] = Owned(salt, prompt[:cached], cached)
        return owner

    @rule(target=owners, prompt=PROMPTS, salt=st.sampled_from([b"", b"", b"x"]))
    def prefill(self, prompt: list[int], salt: bytes) -> str:
        """What a worker does with a prompt."""
        owner = self.new(prompt, salt)
        missing = prompt[len(self.model[owner].tokens) :]
        self.append(owner, len(missing))
        self.write(owner, missing)
        return owner

    @rule(owner=owners, output=OUTPUTS)
    def decode(self, owner: str, output: list[int]) -> None:
        """What a worker does with a running sequence."""
        owned = self.model[owner]
        for token in output:
            if owned.reserved == len(owned.tokens):
                self.append(owner, 1)
            self.write(owner, [token])

    @rule(owner=owners, count=st.integers(1, 5), output=OUTPUTS)
    def roll_back(self, owner: str, count: int, output: list[int]) -> None:
        """What a worker does with drafts that were refused: other tokens take the place of the last ones."""
        owned = self.model[owner]
        refused = list(owned.tokens)
        self.keep(owner, max(0, len(owned.tokens) - count))
        self.decode(owner, output)
        # Nobody may find the refused tokens' names over what replaced them.
        prober = self.new([*refused, 0], owned.salt)
        self.everybody_reads_what_he_wrote()
        self.free(prober)

    @rule(owner=owners, count=st.integers(0, 9))
    def append(self, owner: str, count: int) -> None:
        before = self.books()
        owned = self.model[owner]
        appended = self.pool.append(owner, count)
        if appended is None:
            assert self.books() == before, "a refused append changes nothing"
            assert self.pool.blocks_for(count) + 1 > self.pool.available_count, "there was room"
            return
        for source, target in appended.copies:
            self.memory[target] = list(self.memory[source])
        owned.reserved += count

    @rule(owner=owners, tokens=OUTPUTS)
    def write(self, owner: str, tokens: list[int]) -> None:
        owned, size = self.model[owner], self.pool.block_size
        start = len(owned.tokens)
        owned.tokens += tokens[: owned.reserved - start]
        table = self.pool.table(owner)
        for position in range(start, len(owned.tokens)):
            block_id = table[position // size]
            readers = [other for other in self.model if block_id in self.pool.table(other)]
            assert readers == [owner], f"block {block_id} is about to be written while {readers} hold it"
            self.memory[block_id][position % size] = (owned.salt, tuple(owned.tokens[: position + 1]))
        sealed = self.pool.seal(owner, owned.tokens, len(owned.tokens))
        assert [each.index for each in sealed] == list(range(start // size, len(owned.tokens) // size))
        assert [each.block_id for each in sealed] == [table[each.index] for each in sealed]

    @rule(target=owners, parent=owners)
    def fork(self, parent: str) -> object:
        owned = self.model[parent]
        if owned.reserved > len(owned.tokens):
            return multiple()  # slots that two owners have both reserved would be written twice
        child = self.name()
        self.pool.fork(parent, child)
        self.model[child] = Owned(owned.salt, list(owned.tokens), owned.reserved)
        return child

    @rule(target=owners, parent=owners, first=OUTPUTS, second=OUTPUTS)
    def part_ways(self, parent: str, first: list[int], second: list[int]) -> object:
        """What a worker does at the first token of a request with n = 2."""
        child = self.fork(parent)
        if isinstance(child, str):
            self.decode(child, first)
            self.decode(parent, second)
        return child

    @rule(owner=owners, share=st.floats(0, 1))
    def truncate(self, owner: str, share: float) -> None:
        self.keep(owner, int(self.model[owner].reserved * share))

    @rule(owner=consumes(owners))
    def free(self, owner: str) -> None:
        self.pool.free(owner)
        del self.model[owner]

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            assert set(self.pool.owners) == set(self.model)
            in_use = {block_id for owner in self.model for block_id in self.pool.table(owner)}
            assert self.pool.available_count == self.pool.num_blocks - len(in_use)

    @invariant()
    def everybody_reads_what_he_wrote(self) -> None:
        size = getattr(self, "pool", BlockPool(1, 1)).block_size
        for owner, owned in getattr(self, "model", {}).items():
            table = self.pool.table(owner)
            assert self.pool.filled(owner) == len(owned.tokens)
            assert len(set(table)) == len(table) == self.pool.blocks_for(owned.reserved)
            for position in range(len(owned.tokens)):
                slot = self.memory[table[position // size]][position % size]
                assert slot == (owned.salt, tuple(owned.tokens[: position + 1])), f"{owner}, token {position}: {slot}"

    def teardown(self) -> None:
        for owner in list(getattr(self, "model", {})):
            self.free(owner)
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.available_count == self.pool.num_blocks

    def keep(self, owner: str, count: int) -> None:
        self.model[owner].reserved = count
        del self.model[owner].tokens[count:]
        self.pool.truncate(owner, count)

    def name(self) -> str:
        self.count += 1
        return f"r{self.count}"

    def books(self) -> tuple[object, ...]:
        tables = {owner: (self.pool.table(owner), self.pool.filled(owner)) for owner in self.pool.owners}
        return tables, self.pool.available_count, self.pool.cached_count


TestBlockPool = PoolMachine.TestCase
