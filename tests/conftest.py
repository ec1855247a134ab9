"""What most tests need: small random models with a real tokenizer, and the embedded model where it is at hand."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's client is imported: no test asks the network

# A job in the background may be started deaf to Ctrl-C, which the processes of tests would inherit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from hub_cache import hub

# The process of pytest-xdist that hands out tests needs none of torch, transformers, pandas.
if TYPE_CHECKING:
    import torch

    from saeffect.errors import SaeffectError
    from saeffect.lm.language_model import LanguageModel

__all__ = ["hub"]

SENTENCES = (
    "The nurse gave the patient a small dose of insulin.",
    "A doctor looks at the blood test of the patient.",
    "The train to the old town leaves at nine in the morning.",
    "Snow fell on the quiet hills and the river froze.",
    "The patient had a fever, a cough and some pain.",
    "She wrote a letter to the old doctor in the town.",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample", default="1", metavar="N[:KEY]", help="run one in N simulations and slow tests; KEY chooses which"
    )


@pytest.hookimpl(trylast=True)  # after -m has left out its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is sampled and not in the sample: each is in it for one key in N, the same key always. What takes
    longest comes first.
    """
    share, _, key = config.getoption("--sample").partition(":")
    sampled = [item for item in items if item.get_closest_marker("simulation") or item.get_closest_marker("slow")]
    left_out = [item for item in sampled if zlib.crc32(f"{key}{item.nodeid}".encode()) % int(share)]
    config.hook.pytest_deselected(items=left_out)
    out = set(left_out)
    long = {_scope(item.nodeid) for item in sampled if item not in out}
    items[:] = sorted((item for item in items if item not in out), key=lambda item: _turn(_scope(item.nodeid), long))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[Any]:
    """Skip a test that compares with a peer's package where it is not installed, as its fixture does."""
    try:
        return (yield)
    except ModuleNotFoundError as missing:
        if missing.name in ("sae_lens", "transformer_lens"):
            pytest.skip(f"pip install 'saeffect[peers]': {missing}")
        raise


pytest_fixture_setup = pytest_pyfunc_call


# Tests that share what takes long to make stay in one process: the demo study in its reduced form, the server that
# starts processes, and the report that `report/conftest.py` draws.
_TOGETHER: dict[str, tuple[str, ...]] = {
    "real run": (
        *("scripts/test_reduced_demo.py", "study/test_label_real.py"),
        "web/play/test_in_browser.py::test_the_embedded_pair_answers",
    ),
    "forking": (
        *("study/test_processes.py", "sae/test_training_processes.py", "sae/test_loggers.py", "cli/test_train_sae.py"),
        *("sae/test_training_resume.py", "features/test_projection.py", "test_parallel.py", "test_allocation.py"),
    ),
    "report": ("report/test_", "report/figures/"),
}
_LONGEST = (*_TOGETHER, "web/", "test_public.py", "study/", "sae/", "cli/")


def _scope(nodeid: str) -> str:
    """The tests that one process takes as a whole: one of `_TOGETHER`, or a file."""
    test = nodeid.removeprefix("tests/")
    together = (scope for scope, starts in _TOGETHER.items() if test.startswith(starts))
    return next(together, test.split("::", 1)[0])


def _turn(scope: str, long: set[str]) -> int:
    places = (place for place, start in enumerate(_LONGEST) if scope.startswith(start))
    return min(next(places, len(_LONGEST)), len(_TOGETHER) if scope in long else len(_LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A scope's tests stay in one process."""
    from xdist.scheduler import LoadFileScheduling

    class ByScope(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return ByScope(config, log)


@pytest.fixture(scope="session", autouse=True)
def _small_and_alone() -> None:
    import torch

    from tiny_study import write_little

    torch.set_num_threads(1)
    write_little()
    os.fsync = lambda _: None  # what tests write need not survive a power cut


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 320 tokens, learnt from `SENTENCES`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def _random(config: Any, seed: int = 0) -> Any:
    """A model of this configuration whose every parameter matters: norms and biases are random too."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 1.0 if name.endswith("weight") else 0.0
                parameter.data = center + 0.3 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """Builds a random model from a transformers configuration."""
    return _random


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: Any) -> LanguageModel:
    """Three blocks, 32 wide, 320 tokens, grouped queries, untied."""
    from transformers import LlamaConfig

    from saeffect.lm.language_model import LanguageModel

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LanguageModel(_random(config), tiny_tokenizer, "tiny-llama", "tiny-llama")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_tokenizer: Any) -> LanguageModel:
    """Three blocks, 32 wide, 320 tokens, tied."""
    from transformers import GPT2Config

    from saeffect.lm.language_model import LanguageModel

    config = GPT2Config(
        vocab_size=320,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LanguageModel(_random(config), tiny_tokenizer, "tiny-gpt2", "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_llama_folder(tiny_llama: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` as save_pretrained writes it. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama.model.save_pretrained(folder)
    tiny_llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_model() -> LanguageModel:
    """SmolLM2-135M-Instruct; fetched on the first use on a machine."""
    from saeffect.config import ModelConfig
    from saeffect.errors import Unreachable
    from saeffect.lm.loading import load_language_model

    try:
        return load_language_model(ModelConfig(path="bundled:smollm2-135m-instruct"))
    except Unreachable as error:
        pytest.skip(f"the embedded model is neither in the cache nor reachable: {error.message}")


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the demo study in its reduced form, on the embedded pair. Copy it before changing anything.

    Tests that ask for it are named in `_TOGETHER`, or several processes would make it.
    """
    run = tmp_path_factory.mktemp("real") / "run"
    runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "reduced_demo.py"))["main"](run)
    return run


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Int64 `[2, 9]`, ids of the tiny models."""
    import torch

    return torch.randint(1, 320, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def complains() -> Callable[..., Any]:
    """`with complains(BadFile, "NaN", at="arms.a"):` — the error, its text, its place, and the form it shows in."""

    from saeffect.errors import SaeffectError

    @contextlib.contextmanager
    def check(kind: type[SaeffectError], *parts: str, at: str | None = None) -> Iterator[None]:
        with pytest.raises(SaeffectError) as caught:
            yield
        error = caught.value
        assert type(error) is kind, error
        lines = str(error).split("\n")
        assert lines[0].startswith(f"{kind.__name__}: ")
        assert len(lines) <= 3, "an error is a message, a place and a remedy, one line each"
        for part in parts:
            assert part in str(error)
        if at is not None:
            assert at in (error.at or ""), error
            assert f"  at:  {error.at}" in lines

    return check


@pytest.fixture(scope="module")
def without_figures() -> Iterator[None]:
    """For a module's tests: no figure is drawn."""
    from tiny_study import only_figures

    with only_figures():
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study with its finished `run`, without figures, and `before`: that run when nothing was steered yet.

    Copy it before changing anything.
    """
    from filelock import FileLock

    from saeffect.study.run import run_study
    from saeffect.study.study import Study
    from tiny_study import BEFORE_STEERING, make_study, only_figures

    # All processes of pytest-xdist share one.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-run"
    with FileLock(f"{folder}.lock"):
        if not (folder / "finished").exists():
            folder.mkdir()
            with only_figures():
                study = Study.open(make_study(folder))
                run_study(study, folder / "before", stages=BEFORE_STEERING)
                shutil.copytree(folder / "before", folder / "run")
                run_study(study, folder / "run")
            (folder / "finished").touch()
    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running Chromium; skips where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()
