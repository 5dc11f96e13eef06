"""The parts of the studies (tests/paper) that could give a wrong figure without an error."""

import importlib
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from scipy.stats import spearmanr

import edm

sys.path.append(str(Path(edm.__file__).parent / "tests/paper"))
import runs  # noqa: E402
import figure6  # noqa: E402
import figure7  # noqa: E402
import small_data  # noqa: E402
import table1  # noqa: E402
import table13  # noqa: E402
import variations  # noqa: E402

SCRIPT = """
import json, pathlib, sys, numpy as np
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--resume" in words:
    folder = pathlib.Path(words["--resume"])
    np.savez(folder / "final_returns.npz")
    returns = "".join(f"{i},eval/return_mean,{x}\\n" for i, x in enumerate([100, 10, 20, 30]))
    (folder / "metrics.csv").write_text(
        "step,key,value\\n" + returns + "3,eval/normalized_score,nan\\n3,diffusion/c2st,0.6\\n3,perf/x,3\\n")
else:  # as if stopped at once
    folder = pathlib.Path(words["--out-dir"]) / "env__name__0__1"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"seed": int(words["--seed"])}))
    sys.exit(2)
"""


def test_bad_input_ends_a_study_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["small_data.py", "--out", str(tmp_path), "--data", "moon", "--seeds", "0"]
    )
    with pytest.raises(SystemExit) as stop:
        runs.launch(small_data.main, small_data.Args, "")
    out, err = capsys.readouterr()
    assert (
        stop.value.code == 2
        and err.startswith("error: moon is none of")
        and err.count("\n") == 1
        and not out
    )


def test_run_is_made_once_and_goes_on(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with pytest.raises(edm.RunError, match="one has failed"):
        runs.run(tmp_path, "one", tmp_path / "script.py", seed=3)
    folder = runs.run(tmp_path, "one", tmp_path / "script.py", seed=3)
    assert json.loads((folder / "args.json").read_text()) == {"seed": 3}
    (tmp_path / "script.py").write_text("raise SystemExit(2)")
    assert runs.run(tmp_path, "one", tmp_path / "script.py", seed=3) == folder
    with pytest.raises(edm.RunError, match="was made with another seed"):
        runs.run(tmp_path, "one", tmp_path / "script.py", seed=4)
    with pytest.raises(edm.RunError, match="two has failed"):
        runs.run(tmp_path, "two", tmp_path / "script.py", seed=3)


def test_two_jobs_make_a_run_once(tmp_path):
    (tmp_path / "script.py").write_text(
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[2]) / str(time.time_ns())\n"
        "folder.mkdir()\n(folder / 'args.json').touch()\ntime.sleep(0.3)\n(folder / 'final_returns.npz').touch()"
    )
    first, second = runs.at_once(2, 2 * [lambda: runs.run(tmp_path, "one", tmp_path / "script.py")])
    assert first == second and [x for x in (tmp_path / "one").iterdir() if x.is_dir()] == [first]


def test_results_outlive_their_runs(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    script = str(tmp_path / "script.py")
    with pytest.raises(edm.RunError, match="one has failed"):
        runs.result(tmp_path / "results.jsonl", "one", script, seed=3)
    values = runs.result(tmp_path / "results.jsonl", "one", script, seed=3)
    assert values == dict(return_mean=20, score=2, c2st=0.6)  # of the last three evaluations
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "script.py").unlink()
    assert runs.result(tmp_path / "results.jsonl", "one", script, seed=3)["score"] == 2
    with pytest.raises(edm.RunError, match="has a one with another seed"):
        runs.result(tmp_path / "results.jsonl", "one", script, seed=4)

    # Another run takes the samples of the first, which is made again, and comes out otherwise.
    (tmp_path / "script.py").write_text(SCRIPT.replace("100, 10, 20, 30", "100, 10, 20, 33"))
    take_samples = dict(source=("one", script, dict(seed=3)), seed=5)
    for message in ("one has failed", "one was made anew"):
        with pytest.raises(edm.RunError, match=message):
            runs.result(tmp_path / "results.jsonl", "two", script, **take_samples)


STUDIES = [(variations, dict(study=study)) for study in variations.STUDIES]
STUDIES += [
    (small_data, dict(methods=tuple(small_data.METHODS), agents=("td3bc", "iql"))),
    (table13, {}),
]
STUDIES += [(figure6, dict(methods=tuple(figure6.METHODS), tasks=("dmc/cheetah-run",)))]


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("study, options", STUDIES)
def test_scripts_understand_every_run_of_a_study(tmp_path, monkeypatch, study, options, scale):
    names = []

    def check(path, name, script, source=None, takes=None, **options):
        names.append(name)
        for script, own in [(script, options)] + ([source[1:]] if source else []):
            parsed = tyro.cli(
                importlib.import_module(Path(script).stem).Args, args=runs.words_of(own)
            )
            assert {key: getattr(parsed, key) for key in own} == own

    monkeypatch.setattr(study, "result", check)
    for name in ("run", "collect", "film", "show"):
        monkeypatch.setattr(study, name, lambda *_, **__: Path("images"), raising=False)
    study.main(study.Args(out=tmp_path, scale=scale, seeds=2, workers=1, **options))
    assert len(set(names)) == len(names) >= 6


def test_our_own_results_are_shown_without_a_run(tmp_path, monkeypatch, capsys):
    """Each seed that is recorded is found there, and nothing is filmed, trained or added."""
    shutil.copytree(Path(runs.__file__).parent / "results", tmp_path / "results")
    before = {path: path.read_text() for path in (tmp_path / "results").glob("*.jsonl")}
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: pytest.fail("something is run"))
    out = tmp_path / "results"
    table13.main(table13.Args(out))
    variations.main(variations.Args("table3", out))
    figure6.main(figure6.Args(out, tasks=("Hopper-v4",), methods=("sac",)))
    small_data.main(
        small_data.Args(out, data=("hopper",), sizes=(5_000,), seeds=1)
    )  # without the hopper.hdf5
    shown = capsys.readouterr().out
    lines = (
        "| critic | 7.9 (1) | 6.3 (1) |",
        "| 14.2 (1) |",
        "| 239 ± 15 (3) |",
        "| 28.7 ± 14.1 (5) |",
    )
    assert all(line in shown for line in lines)
    assert before == {path: path.read_text() for path in before}


def test_pairs_of_figure7(tmp_path):
    """Runs of one task are paired with those of the other kind, and what has too few seeds, or is more, is left out."""
    entries = [dict(env=env, data=data, seed=seed, values=dict(score=10 * seed + (data == "synther")))
               for env in "ab" for data in ("real", "synther") for seed in range(3 if env == "a" else 2)]  # fmt: skip
    entries += [dict(env="c", data="real", seed=0, values=dict(score=0))]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, entries)))
    args = figure7.Args(
        paths=(tmp_path / "x.jsonl",), new=("data=synther",), old=("data=real",), seeds=2
    )
    new, old = figure7.paired_scores(args)
    assert new.tolist() == [[1, 1], [11, 11]] and old.tolist() == [[0, 0], [10, 10]]
    args.old = ("env=a",)
    with pytest.raises(edm.RunError, match="two --old runs"):
        figure7.paired_scores(args)


def test_no_job_begins_after_an_error():
    begun = []

    def job(i):
        begun.append(i)
        if i == 1:
            sys.exit("error")
        time.sleep(0.02)
        return i

    with pytest.raises(SystemExit):
        runs.at_once(1, [lambda i=i: job(i) for i in range(50)])
    assert len(begun) < 50 and runs.at_once(2, [lambda i=i: i for i in range(5)]) == list(range(5))


def test_data_multiplier():
    """5,000 rows with the score of 10,000 real ones are worth twice their number."""
    real = {2_500: [1.0, 3.0], 5_000: [5.0, 5.0], 10_000: [9.0, 11.0, 10.0]}
    generated = {5_000: [10.0, 10.0, 10.0], 10_000: [12.0, 12.0], 2_500: [0.0, 1.0]}
    assert small_data.multiplier(real, generated) == [
        "fewer than tried", "2.0 (1.8 to more than tried)", "more than tried"
    ]  # fmt: skip
    assert small_data.multiplier(real, {1_000: [5.0]}) == ["5.0"]


def test_copula_and_independent_columns():
    """Both keep the distributions of the columns, and the first their correlations, the second none."""
    torch.manual_seed(0)
    x = torch.randn(5_000, 1)
    rows = torch.cat([x.exp(), x + 0.5 * torch.randn_like(x), torch.zeros_like(x)], dim=1)
    copula, independent = table1.copula(rows, 4_000), table1.independent(rows, 4_000)
    for samples in (copula, independent):
        assert edm.marginal(rows, samples) > 0.98 and (samples[:, 2] == 0).all()
    rho, rho_copula, rho_independent = (
        spearmanr(x[:, 0], x[:, 1])[0] for x in (rows, copula, independent)
    )
    assert rho > 0.8 and rho_copula == pytest.approx(rho, abs=0.02) and abs(rho_independent) < 0.06
