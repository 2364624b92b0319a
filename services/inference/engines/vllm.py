"""Serves with vLLM: `AsyncLLM` in this process, its computing process as a child that dies with it. Not pure: os.

It, its neighbours vllm_*.py, the reader of answers and the check of imports alone import vllm. It refuses to know gRPC,
tenants and where adapters come from.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from chassis.objects.held_folders import HeldFolder
from formats.prompts.model_folder import read_model_folder
from formats.prompts.tokenizer_files import write_tokenizer_files
from formats.rows import Message
from services.inference.engines.adapters.adapter_check import has_experts, module_shapes, takes_adapters
from services.inference.engines.adapters.adapter_table import Adapter
from services.inference.engines.answer_chunks import Chunk, TokenLogprob, Usage
from services.inference.engines.answer_form import AnswerForm
from services.inference.engines.answers.answer_reading import AnswerReading, Guide
from services.inference.engines.base import (
    AdapterInvalid,
    EngineBusy,
    EngineFailed,
    EngineSettings,
    GenerateRequest,
    PromptFailed,
)
from services.inference.engines.in_process import ENDED, InProcessEngine
from services.inference.engines.parent_watch import DieWithParent
from services.inference.engines.prompts.renderer import PromptRenderer
from services.inference.engines.socket_folders import socket_folders
from services.inference.engines.vllm_cpu import CpuExecutor
from services.inference.engines.vllm_words import (
    finish_reason_of,
    invalid_of,
    logprob_of,
    prompt_limits,
    reading_limits,
)

# The ranks that vLLM has kernels for; an operator's limit is rounded up to the next of them.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_CPU_KV_CACHE_BYTES = 1 << 30
_LIVENESS_POLL_S = 0.2
_TOKENIZER = "tokenizer"
# vLLM reads its thread count and socket folder from the environment while it starts, so starts take turns.
_STARTING = threading.Lock()


class VllmEngine(InProcessEngine):
    """One base model on the CPU or on the GPUs named in the settings."""

    def __init__(self, model_path: Path, settings: EngineSettings) -> None:
        super().__init__(model_path, settings)
        self._prompts = PromptRenderer(model_path, prompt_limits(settings))
        self._answers = AnswerReading(settings.parsers, reading_limits(settings))
        self._warming: asyncio.Task[None] | None = None
        self._sockets: HeldFolder | None = None
        self._llm: AsyncLLM | None = None
        self._stopped = False
        self._elder_children: frozenset[BaseProcess] | None = None

    @property
    def on_gpus(self) -> bool:
        return not current_platform.is_cpu()

    async def start(self) -> None:
        await self._read_model()
        if not takes_adapters(self._config) or (current_platform.is_cpu() and has_experts(self._config)):
            # With adapters switched on, vLLM computes experts by a kernel that only GPUs have.
            self._settings = replace(self._settings, adapters_resident_max=0)
        await self._prompts.start(self._context_tokens_max)
        starting = asyncio.ensure_future(asyncio.to_thread(self._start_llm))
        try:
            self._llm = await asyncio.wait_for(asyncio.shield(starting), self._settings.start_timeout_s)
        except asyncio.CancelledError:
            await self._abandon(starting)
            raise
        except TimeoutError as error:
            await self._abandon(starting)
            raise EngineFailed(f"vLLM did not start within {self._settings.start_timeout_s} s") from error
        except Exception as error:
            # vLLM reports everything that can go wrong here (memory, shapes, a dead child) as assorted builtins.
            raise EngineFailed(f"vLLM did not start: {error}") from error
        assert self._sockets is not None, "vLLM has read the tokenizer there"
        self._answers.open(self._sockets.path / _TOKENIZER)
        self._warming = asyncio.create_task(self._warm_answers())

    async def stop(self) -> None:
        self._stopped = True
        await self._prompts.stop()
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.wait([self._warming])
        await self._answers.stop()
        llm, self._llm = self._llm, None
        try:
            if llm is not None:
                with suppress(EngineDeadError):
                    # Shutting down alone would leave their readers waiting for ever.
                    await llm.abort(tuple(self._unfinished))
                await asyncio.to_thread(llm.shutdown, self._settings.stop_grace_s)
        finally:
            sockets, self._sockets = self._sockets, None
            if sockets is not None:
                await asyncio.to_thread(sockets.close)

    async def health(self) -> None:
        self._running()

    async def wait_failed(self) -> EngineFailed:
        # vLLM offers a flag and nothing to wait for.
        while self._stopped or self._llm is None or not (self._llm.errored or self._deadline.passed):  # noqa: ASYNC110
            await asyncio.sleep(_LIVENESS_POLL_S)
        return EngineFailed(ENDED if self._deadline.passed else "the computing process of vLLM has died")

    async def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
    ) -> tuple[int, ...]:
        return await self._prompts.render_chat(messages, tools, enable_thinking=enable_thinking)

    async def render_text(self, text: str) -> tuple[int, ...]:
        return await self._prompts.render_text(text)

    async def count_tokens(self, text: str) -> int:
        return await self._prompts.count_tokens(text)

    async def check_form(self, form: AnswerForm) -> None:
        await self._answers.guide(form)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        llm = self._running()
        try:
            async with self._admitted(request) as (tokens_max, adapter):
                guide = Guide() if request.form is None else await self._answers.guide(request.form)
                sampling = _sampling(request, tokens_max, guide, adapter)
                prompt = tokens_input(list(request.prompt_token_ids))
                outputs = llm.generate(prompt, sampling, request.request_id, lora_request=_lora(adapter))
                async with aclosing(self._read(request, self._chunks(request, outputs))) as chunks:
                    async for chunk in chunks:
                        yield chunk
        except EngineDeadError as error:
            raise EngineFailed("the computing process of vLLM has died") from error
        except GracefulHTTPError as error:
            raise EngineBusy(str(error)) from error
        except VLLMClientError as error:
            raise invalid_of(error) from error
        except EngineGenerateError as error:
            raise EngineFailed(f"vLLM failed on a request: {error.__cause__}") from error

    async def _read(self, request: GenerateRequest, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """The chunks with thoughts, text and calls apart, where a parser reads them."""
        reader = self._answers.reader(request.request_id, request.form, request.prompt_token_ids)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk if reader is None else await reader.read(chunk)
        finally:
            if reader is not None:
                await reader.close()

    async def _warm_answers(self) -> None:
        with suppress(PromptFailed):
            await self._answers.start()

    async def score(self, token_ids: Sequence[int], adapter_revision: str | None) -> tuple[float | None, ...]:
        """Log-probability of each token after those before it (None for the first).

        At most one token less than the context: vLLM scores a prompt only on the way to a token after it.
        """
        llm = self._running()
        request_id = f"score-{uuid.uuid4().hex}"
        sampling = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        async with self._locked(adapter_revision) as adapter:
            outputs = llm.generate(tokens_input(list(token_ids)), sampling, request_id, lora_request=_lora(adapter))
            async for output in outputs:
                ranked = output.prompt_logprobs
        return tuple(
            None if entry is None else entry[token_id].logprob
            for token_id, entry in zip(token_ids, ranked, strict=True)
        )

    async def _chunks(
        self, request: GenerateRequest, outputs: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Chunk, None]:
        """Convert outputs; vLLM merges what arrives while nobody reads, so a pause between reads makes the batches."""
        completion_tokens = 0
        choices_left = request.sampling.choices
        clock = asyncio.get_running_loop()
        async with aclosing(outputs):
            async for output in outputs:
                # What was computed before the deadline may have waited while this process was frozen.
                self._check_deadline()
                sent_at = clock.time()
                completion_tokens += sum(len(part.token_ids) for part in output.outputs)
                usage = Usage(
                    prompt_tokens=len(request.prompt_token_ids),
                    completion_tokens=completion_tokens,
                    prompt_tokens_cached=output.num_cached_tokens or 0,
                )
                for part in output.outputs:
                    finish_reason = finish_reason_of(part.finish_reason)
                    choices_left -= finish_reason is not None
                    yield Chunk(
                        text=part.text,
                        token_ids=tuple(part.token_ids),
                        usage=usage,
                        choice=part.index,
                        logprobs=await self._logprobs(part) if part.logprobs else (),
                        finish_reason=finish_reason,
                        is_last=not choices_left,
                    )
                if not output.finished:
                    await asyncio.sleep(max(0.0, sent_at + self._settings.chunk_interval_s - clock.time()))

    async def _logprobs(self, part: Any) -> tuple[TokenLogprob, ...]:
        texts = await self._prompts.texts_of([token_id for ranked in part.logprobs for token_id in ranked])
        return tuple(
            logprob_of(token_id, ranked, texts) for token_id, ranked in zip(part.token_ids, part.logprobs, strict=True)
        )

    def _running(self) -> AsyncLLM:
        self._check_deadline()
        if self._llm is None or self._stopped:
            raise EngineFailed("the engine is not running")
        if self._llm.errored:
            raise EngineFailed("the computing process of vLLM has died")
        return self._llm

    async def _load(self, adapter: Adapter) -> None:
        try:
            await self._running().add_lora(_lora(adapter))
        except EngineDeadError as error:
            raise EngineFailed("the computing process of vLLM has died") from error
        except EngineFailed:
            raise
        except Exception as error:
            # What the child raised arrives as a bare Exception with its text.
            raise AdapterInvalid(adapter.revision, f"vLLM refuses it: {error}") from error

    async def _unload(self, adapter: Adapter) -> None:
        try:
            await self._running().remove_lora(adapter.number)
        except EngineDeadError as error:
            raise EngineFailed("the computing process of vLLM has died") from error

    def _start_llm(self) -> AsyncLLM:
        with _STARTING:
            self._sockets = socket_folders().open(uuid.uuid4().hex[:16])
            deadline = self._deadline.share(self._sockets.path / "deadline")
            os.environ["VLLM_RPC_BASE_PATH"] = str(self._sockets.path)
            if current_platform.is_cpu():
                os.environ["OMP_NUM_THREADS"] = str(self._settings.threads or len(os.sched_getaffinity(0)))
                # Threads that spin while they wait take the cores from whatever else this machine runs, and then wait
                # for it in turn: beside two busy processes on two cores an answer took 15 s instead of 0.7 s.
                os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
                # Eager means eager: vLLM still compiles a helper on the first request for logprobs, which stops every
                # other request of the engine for twenty seconds.
                os.environ["TORCHDYNAMO_DISABLE"] = "1"
            tokenizer = self._sockets.path / _TOKENIZER
            tokenizer.mkdir()
            read = read_model_folder(self._model_path)
            write_tokenizer_files(read.tokenizer, read.special_tokens, tokenizer)
            arguments = _engine_args(
                self._model_path, tokenizer, self._config, self._settings, self._context_tokens_max
            )
            config = arguments.create_engine_config()
            # vLLM's computing process does not notice that its parent was killed and would hold its memory and GPU for
            # ever; nor that its devices are another's. This field travels there as it is, and is unpickled before
            # anything of vLLM starts.
            object.__setattr__(config, "additional_config", DieWithParent(config.additional_config, deadline))
            self._elder_children = frozenset(multiprocessing.active_children())
            return AsyncLLM.from_vllm_config(config, disable_log_stats=True)

    async def _abandon(self, starting: asyncio.Future[AsyncLLM]) -> None:
        """End a start that nobody waits for. Its thread cannot be interrupted, but it gives up when its child dies."""
        while not starting.done():
            if self._elder_children is not None:
                for child in frozenset(multiprocessing.active_children()) - self._elder_children:
                    child.kill()
            await asyncio.sleep(_LIVENESS_POLL_S)
        if starting.exception() is None:
            self._llm = starting.result()


def _engine_args(
    model_path: Path, tokenizer: Path, config: dict[str, Any], settings: EngineSettings, context_tokens_max: int
) -> AsyncEngineArgs:
    cpu = current_platform.is_cpu()
    devices = 1 if cpu else max(1, len(settings.gpu_indices))
    kv_cache_bytes = _CPU_KV_CACHE_BYTES if cpu and settings.kv_cache_bytes is None else settings.kv_cache_bytes
    arguments: dict[str, Any] = {
        "model": str(model_path),
        # As prompts have it (formats/prompts): by the model's own folder vLLM might read other tokens.
        "tokenizer": str(tokenizer),
        "tokenizer_mode": "hf",
        "trust_remote_code": False,
        "load_format": "safetensors",
        # The hub's defaults would change a request behind the caller's back; its eos_token_id vLLM reads all the same.
        "generation_config": "vllm",
        "dtype": "float32" if cpu and settings.dtype == "auto" else settings.dtype,
        "max_model_len": context_tokens_max,
        "max_num_seqs": settings.sequences_max,
        "kv_cache_memory_bytes": kv_cache_bytes,
        "gpu_memory_utilization": settings.gpu_memory_fraction,
        "enforce_eager": cpu or settings.eager,
        "disable_log_stats": True,
        # The one that forms are tried with before they are taken (answers/answer_program.py).
        "structured_outputs_config": {"backend": "xgrammar"},
        # The class, not its name: on a CPU vLLM turns the name "uni" into a second process with its own imports.
        "distributed_executor_backend": (CpuExecutor if cpu else UniProcExecutor) if devices == 1 else "mp",
    }
    if not cpu:
        arguments["tensor_parallel_size"] = devices
        arguments["device_ids"] = list(settings.gpu_indices) or None
    if settings.adapters_resident_max:
        arguments["enable_lora"] = True
        arguments["lora_target_modules"] = [name.rpartition(".")[2] for name in module_shapes(config)]
        arguments["max_loras"] = min(settings.adapters_in_batch_max, settings.adapters_resident_max)
        arguments["max_cpu_loras"] = settings.adapters_resident_max
        arguments["max_lora_rank"] = next(rank for rank in _RANKS if rank >= settings.adapter_rank_max)
    return AsyncEngineArgs(**arguments)


def _sampling(request: GenerateRequest, tokens_max: int, guide: Guide, adapter: Adapter | None) -> SamplingParams:
    wanted = request.sampling
    # Those of the base vLLM adds itself, unless ends are to be ignored.
    ends = frozenset() if adapter is None or wanted.ignore_eos else adapter.ends
    return SamplingParams(
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        max_tokens=tokens_max,
        stop=list(wanted.stop),
        stop_token_ids=sorted(ends),
        seed=wanted.seed,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        repetition_penalty=wanted.repetition_penalty,
        min_p=wanted.min_p,
        logit_bias=dict(wanted.logit_bias) or None,
        min_tokens=wanted.completion_tokens_min,
        ignore_eos=wanted.ignore_eos,
        n=wanted.choices,
        logprobs=wanted.logprobs,
        structured_outputs=None if guide.structured is None else StructuredOutputsParams(**guide.structured),
        skip_special_tokens=not guide.special_tokens,
        output_kind=RequestOutputKind.DELTA,
    )


def _lora(adapter: Adapter | None) -> LoRARequest | None:
    if adapter is None:
        return None
    # The name is part of vLLM's prefix cache key, so two adapters can never share cached state.
    return LoRARequest(lora_name=adapter.revision, lora_int_id=adapter.number, lora_path=str(adapter.path))
