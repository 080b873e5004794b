"""A small random model decoding through a loop: what the tests of several folders share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, StaticCache

from mpk_dynamo import pipeline
from mpk_dynamo.loop import LoopState, Sampling
from mpk_dynamo.report import Report
from mpk_dynamo.settings import Settings

CAPACITY, PROMPT = 64, 7
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {"llama": lambda: LlamaConfig(**SIZES), "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32)}


def model_of(family: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """Weights are made on the CPU: the same on every machine."""
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval().to(dtype).to(device)


@dataclass
class Generation:
    """What one generation left behind. args: what the loop's launches were given."""

    state: LoopState
    prompt: torch.Tensor
    cache: StaticCache
    fed: dict[str, Any]
    ran: list[int]
    args: tuple[Any, ...] = ()

    @property
    def tokens(self) -> torch.Tensor:
        return self.state.tokens[:, : int(self.state.step)].cpu()


class Decoding:
    """Generations of one model with one compiled loop; `pads`: tokens of padding to the left of each prompt."""

    def __init__(self, model: Any, sampling: Sampling, batch: int, pads: Sequence[int] = (), **options: Any) -> None:
        self.model, self.sampling, self.batch = model, sampling, batch
        self.pads = tuple(pads) or (0,) * batch
        self.device = next(model.parameters()).device
        self.report = Report()
        self._loop: Callable[..., int] | None = None
        self._settings = Settings.from_options(options)

    def generate(
        self,
        launches: Sequence[int],
        *,
        seed: int = 5,
        eos: Sequence[int] = (),
        sequence_ids: torch.Tensor | None = None,
        room: int = 0,
    ) -> Generation:
        """Prefill and the first token on the host, then launches of so many steps each. room: for how many more steps
        the state has room."""
        batch, vocab = self.batch, self.model.config.vocab_size
        prompt = torch.randint(2, vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).to(self.device)
        visible = torch.arange(PROMPT)[None] >= torch.tensor(self.pads)[:, None]
        positions = (visible.long().cumsum(1) - 1).clamp(min=0).to(self.device)
        cache = StaticCache(self.model.config, max_cache_len=CAPACITY)
        with torch.no_grad():
            out = self.model(
                prompt, attention_mask=visible.long().to(self.device), position_ids=positions, past_key_values=cache
            )
            most = 1 + sum(launches) + room
            state = LoopState.create(
                batch, most, self.device, vocab, self.sampling, eos=eos, pad=0, seed=seed, seen_ids=prompt,
                sequence_ids=sequence_ids,
            )  # fmt: skip
            token = state.choose(out.logits[:, -1])
            mask = torch.zeros(batch, 1, 1, CAPACITY, dtype=torch.bool)
            mask[:, 0, 0, :PROMPT], mask[..., PROMPT] = visible, True
            fed = {
                "tokens": token[:, None].clone(),
                "positions": [positions[:, -1:].clone() + 1],
                "masks": [mask.to(self.device)],
            }
            made = Generation(state, prompt, cache, fed, [])
            self._step(made, launches)
        return made

    def _step(self, made: Generation, launches: Sequence[int]) -> None:
        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            if self._loop is None:
                self._loop = pipeline.compile_loop(gm, inputs, made.fed, self.sampling, self._settings, self.report)
            loop, outputs = self._loop, len(next(n for n in gm.graph.nodes if n.op == "output").args[0])

            def call(*args: Any) -> tuple[Any, ...]:
                made.args = args
                made.ran += [loop(args, made.state, n) for n in launches]
                return (None,) * outputs

            return call

        torch._dynamo.reset()
        torch.compile(self.model.forward, backend=backend, fullgraph=True)(
            input_ids=made.fed["tokens"],
            position_ids=made.fed["positions"][0],
            attention_mask=made.fed["masks"][0],
            past_key_values=made.cache,
            use_cache=True,
        )
