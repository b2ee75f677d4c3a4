"""A job of prompts: resumed where it stopped, nothing lost or done twice, refusals of one line."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from runtime.execute import execute
from runtime.job import run_job
from runtime.memory import memory_limits
from runtime.models import Decoder
from runtime.options import Options, Run
from runtime.prompts import Text, read_prompts
from sim.plan import Admission
from tests.runtime.plans import Choice, all_in_hbm
from tests.runtime.test_dense import checkpoint
from tests.runtime.where import Where

IDS = [f"p{number}" for number in range(5)]


def write_prompts(path: Path, lines: list[dict[str, object]] | None = None) -> Path:
    given = lines or [{"id": name, "tokens": [number + 1, 2, 3]} for number, name in enumerate(IDS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in given))
    return path


def save_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


class Job:
    """One job on a tiny model, which may be cut off after some waves."""

    def __init__(self, folder: Path, where: Where) -> None:
        self.folder, self.decoder = folder, checkpoint("opt", where)[1]
        self.output = folder / "out.jsonl"
        self.prompts = read_prompts(write_prompts(folder / "in.jsonl"), Text(None))
        self.waves: list[int] = []

    def run(self, *, stop_after: int | None = None, decoder: Decoder | None = None) -> int:
        def tell(_: int, run: Run) -> None:
            self.waves.append(len(run.completions))
            if stop_after is not None and len(self.waves) >= stop_after:
                raise KeyboardInterrupt

        decoder = decoder or self.decoder
        plan = all_in_hbm(decoder.spec, Choice(concurrency=2))
        return run_job(plan, decoder, self.prompts, self.output, Text(None), options=Options(), on_wave=tell)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


def test_an_interrupted_job_goes_on_where_it_stopped(tmp_path: Path, where: Where) -> None:
    (tmp_path / "whole").mkdir()
    whole = Job(tmp_path / "whole", where)
    assert whole.run() == 0
    job = Job(tmp_path, where)
    with pytest.raises(KeyboardInterrupt):
        job.run(stop_after=1)
    assert [line["id"] for line in job.lines()] == IDS[:2]
    job.output.write_bytes(job.output.read_bytes() + b'{"id": "p2", "tok')  # killed while writing
    assert job.run() == 2
    assert job.lines() == whole.lines()
    assert job.waves == [2, 2, 1]
    assert job.run() == 5
    assert job.waves == [2, 2, 1]
    assert job.lines() == whole.lines()


def test_a_continuous_plan_takes_the_job_in_chunks_of_its_batch(tmp_path: Path, where: Where) -> None:
    job = Job(tmp_path, where)
    plan = all_in_hbm(job.decoder.spec, Choice(batch=3, concurrency=2, admission=Admission.CONTINUOUS))
    done: list[int] = []

    def stop(count: int, _: Run) -> None:
        done.append(count)
        if len(done) == 1:
            raise KeyboardInterrupt

    run = partial(run_job, plan, job.decoder, job.prompts, job.output, Text(None), options=Options(), on_wave=stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run() == 3
    assert done == [3, 5]
    whole = Job(tmp_path, where)
    whole.output = tmp_path / "whole.jsonl"
    whole.run()
    assert [line["id"] for line in job.lines()] == IDS
    assert not where.exact or job.lines() == whole.lines()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB. GPU 0 has"),
            "out of GPU memory (Tried to allocate 2 GiB",
        ),
        (MemoryError(), "out of host memory: solve for a smaller batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of host memory: solve for a smaller batch"),
    ],
)
def test_what_was_generated_is_kept_when_memory_runs_out(
    error: Exception, says: str, tmp_path: Path, where: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, waves = Job(tmp_path, where), list[int]()

    def two_waves(*arguments: Any, **options: Any) -> Run:
        waves.append(1)
        if len(waves) > 2:
            raise error
        return execute(*arguments, **options)

    monkeypatch.setattr("runtime.job.execute", two_waves)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        job.run()
    assert "\n" not in str(caught.value)
    assert [line["id"] for line in job.lines()] == IDS[:4]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_limits(gpu="", host=""):
        torch.zeros(2, 3) @ torch.zeros(2, 3)  # shapes cannot be multiplied


def test_text_goes_in_and_comes_out_through_the_checkpoints_tokenizer(tmp_path: Path, where: Where) -> None:
    save_tokenizer(tmp_path)
    text, decoder = Text(tmp_path), checkpoint("opt", where)[1]
    path = write_prompts(tmp_path / "in.jsonl", [{"id": 1, "prompt": "w5 w9"}])
    prompts = read_prompts(path, text)
    assert prompts[0].tokens == (5, 9)
    plan = all_in_hbm(decoder.spec, Choice())
    run_job(plan, decoder, prompts, tmp_path / "out.jsonl", text, options=Options(), on_wave=lambda *_: None)
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line["text"].split() == [f"w{token}" for token in line["tokens"]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"id": 1, "prompt": "text"}, r'line 1, is text, and random weights have no tokenizer: give "tokens"'),
        ({"id": 1}, "line 1, must have either prompt or tokens"),
        ({"tokens": [1]}, "line 1, id=None, must be text or a whole number"),
        ({"id": 1, "tokens": [1.5]}, "line 1, tokens, must be an array of whole numbers"),
        ({"id": 1, "token": [1]}, "line 1, unknown key token, must be id, prompt or tokens"),
        ([1], "line 1, is no JSON object"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: object, says: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=says):
        read_prompts(tmp_path / "in.jsonl", Text(None))


def test_an_id_occurs_once(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "in.jsonl", [{"id": 1, "tokens": [1]}, {"id": 1, "tokens": [2]}])
    with pytest.raises(ValueError, match="line 2, id=1 occurs twice"):
        read_prompts(path, Text(None))


def test_another_jobs_completions_are_left_alone(tmp_path: Path, where: Where) -> None:
    job = Job(tmp_path, where)
    job.output.write_text('{"id": "other", "tokens": []}\n')
    with pytest.raises(ValueError, match="id='other', which no prompt has"):
        job.run()
    job.output.write_text("no completion\n")
    with pytest.raises(ValueError, match="line 1, is no completion"):
        job.run()
    assert job.output.read_text() == "no completion\n"


def test_two_runs_do_not_write_to_one_file(tmp_path: Path, where: Where) -> None:
    job, second = Job(tmp_path, where), Job(tmp_path, where)
    refused: list[str] = []

    def tell(*_: object) -> None:
        with pytest.raises(ValueError, match="another run is writing to it") as caught:
            second.run()
        refused.append(str(caught.value))

    plan = all_in_hbm(job.decoder.spec, Choice())
    run_job(plan, job.decoder, job.prompts, job.output, Text(None), options=Options(), on_wave=tell)
    assert len(refused) == 3


def test_a_prompt_longer_than_the_plans_is_named_before_anything_runs(tmp_path: Path, where: Where) -> None:
    job = Job(tmp_path, where)
    job.prompts = read_prompts(write_prompts(tmp_path / "in.jsonl", [{"id": "long", "tokens": [1] * 10}]), Text(None))
    with pytest.raises(ValueError, match="id='long': prompt 0, 10 tokens, must have 1 to the plan's 9"):
        job.run()
    assert not job.output.exists()
