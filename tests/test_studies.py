"""The parts of the studies (tests/paper) that could give a wrong figure without an error."""

import importlib
import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import tyro
from scipy.stats import spearmanr

import edm

sys.path.append(str(Path(edm.__file__).parent / "tests/paper"))
import figure6
import figure7
import recipes
import runs
import small_data
import table1
import table13
import variations

SCRIPT = """
import pathlib, sys, numpy as np
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--resume" in words:
    folder = pathlib.Path(words["--resume"])
    np.savez(folder / "final_returns.npz")
    returns = "".join(f"{i},eval/return_mean,{x}\\n" for i, x in enumerate([100, 10, 20, 30]))
    others = "3,eval/normalized_score,nan\\n3,diffusion/c2st,0.6\\n3,perf/x,3\\n"
    (folder / "metrics.csv").write_text("step,key,value\\n" + returns + others)
else:  # as if stopped at once
    folder = pathlib.Path(words["--out-dir"]) / "env__name__0__1"
    folder.mkdir()
    (folder / "args.json").touch()
    sys.exit(2)
"""


def test_bad_input_ends_a_study_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"x --out {tmp_path} --data moon --seeds 0".split())
    with pytest.raises(SystemExit, match="2"):
        runs.launch(small_data.main, small_data.Args, "")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: moon is none of") and err.count("\n") == 1


SIGNALLER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(os.environ["PYTHONPATH"]))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


def test_stopped_study_stops_its_scripts(tmp_path, monkeypatch):
    """And begins no other. A script finds what the study's PYTHONPATH names, after the project."""
    (tmp_path / "script.py").write_text(SIGNALLER)
    monkeypatch.setattr(runs, "STOPPED", [])
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", "mine")
    jobs = [partial(runs.run, tmp_path, name, tmp_path / "script.py") for name in "ab"]
    with pytest.raises(SystemExit, match="2"):
        runs.launch(lambda args: runs.at_once(1, jobs), runs.StudyArgs, "")
    paths = f"{runs.ROOT}:{runs.ROOT}/tests/paper:{os.path.abspath('mine')}\n"
    assert (tmp_path / "a/log.txt").read_text() == paths


def test_results_outlive_their_runs(tmp_path):
    """A run is made once, goes on after a stop, and is read from the file when it is gone."""
    path = tmp_path / "results.jsonl"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with pytest.raises(edm.RunError, match="one has failed"):
        runs.result(path, "one", str(script), seed=3)
    values = runs.result(path, "one", str(script), seed=3)
    assert values == dict(return_mean=20, score=2, c2st=0.6)  # of the last three evaluations
    script.write_text("raise SystemExit(2)")
    assert runs.run(tmp_path, "one", script, seed=3) == tmp_path / "one/env__name__0__1"
    with pytest.raises(edm.RunError, match="was made with another seed"):
        runs.run(tmp_path, "one", script, seed=4)
    shutil.rmtree(tmp_path / "one")
    assert runs.result(path, "one", str(script), seed=3) == values
    with pytest.raises(edm.RunError, match="has a one with another seed"):
        runs.result(path, "one", str(script), seed=4)

    # Another run takes the samples of the first, which is made again, and comes out otherwise.
    script.write_text(SCRIPT.replace("100, 10, 20, 30", "100, 10, 20, 33"))
    source = ("one", str(script), dict(seed=3))
    for message in ("one has failed", "one was made anew"):
        with pytest.raises(edm.RunError, match=message):
            runs.result(path, "two", str(script), source, seed=5)


STUDIES = [(variations, dict(study=study)) for study in variations.STUDIES] + [(table13, {})]
STUDIES += [(small_data, dict(methods=tuple(small_data.METHODS), agents=("td3bc", "iql")))]
STUDIES += [(figure6, dict(methods=tuple(figure6.METHODS), tasks=("dmc/cheetah-run",)))]


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("study, options", STUDIES)
def test_scripts_understand_every_run_of_a_study(tmp_path, monkeypatch, study, options, scale):
    names = []

    def check(path, name, script, source=None, takes=None, **options):
        names.append(name)
        if source:
            check(path, f"{name}'s source", source[1], **source[2])
        args_class = importlib.import_module(Path(script).stem).Args
        parsed = tyro.cli(args_class, args=runs.words_of(options))
        assert {key: getattr(parsed, key) for key in options} == options

    monkeypatch.setattr(runs, "result", check)
    monkeypatch.setattr(runs, "run", lambda *_, **__: None)
    for name in ("collect", "film", "show"):
        monkeypatch.setattr(study, name, lambda *_: None, raising=False)
    study.main(study.Args(out=tmp_path, scale=scale, seeds=2, workers=1, **options))
    assert len(set(names)) == len(names) >= 6


def test_our_own_results_are_shown_without_a_run(tmp_path, monkeypatch, capsys):
    """Each seed that is recorded is found there, and nothing is filmed, trained or added."""
    out = tmp_path / "results"
    shutil.copytree(Path(runs.__file__).parent / "results", out)
    before = {path: path.read_text() for path in out.glob("*.jsonl")}
    monkeypatch.setattr(runs.subprocess, "Popen", lambda *_, **__: pytest.fail("something is run"))
    table13.main(table13.Args(out=out))
    variations.main(variations.Args(study="table3", out=out))
    figure6.main(figure6.Args(out=out, tasks=("Hopper-v4",), methods=("sac",)))
    small_data.main(small_data.Args(out=out, data=("hopper",), sizes=(5_000,), seeds=1))
    table1.main(table1.Args(out=out, seeds=0))
    with pytest.raises(edm.RunError, match="pip install -r .*requirements-table1.txt"):
        monkeypatch.setattr(table1, "find_spec", lambda _: None)
        table1.main(table1.Args(out=out))
    shown = capsys.readouterr().out
    lines = ["critic | 7.9 (1) | 6.3 (1)", "14.2 (1)", "239 ± 15 (3)", "28.7 ± 14.1 (5)"]
    lines += ["ctgan | 0.930 | 0.940 | 1.000 | 9.3 ± 1.6 (2)"]
    assert all(f"| {line} |" in shown for line in lines)
    assert before == {path: path.read_text() for path in before}


def test_pairs_of_figure7(tmp_path):
    """Runs of a task are paired with those of the other kind. What has no partner is left out."""
    entries = [dict(env="c", data="real", seed=0, values=dict(score=0))]
    for env, data, seed in product("ab", ("real", "synther"), range(3)):
        values = dict(score=10 * seed + (data == "synther"))
        entries.append(dict(env=env, data=data, seed=seed, values=values))
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, entries[:-1])))
    args = figure7.Args(paths=(path,), new=("data=synther",), old=("data=real",), seeds=2)
    new, old = figure7.paired_scores(args)
    assert new.tolist() == [[1, 1], [11, 11]] and old.tolist() == [[0, 0], [10, 10]]
    args.old = ("env=a",)
    with pytest.raises(edm.RunError, match="two runs of .* with env=a"):
        figure7.paired_scores(args)


def test_data_multiplier():
    """5,000 rows with the score of 10,000 real ones are worth twice their number."""
    real = {2_500: [1.0, 3.0], 5_000: [5.0, 5.0], 10_000: [9.0, 11.0, 10.0]}
    generated = {5_000: [10.0, 10.0, 10.0], 10_000: [12.0, 12.0], 2_500: [0.0, 1.0]}
    worth = ["fewer than tried", "2.0 (1.8 to more than tried)", "more than tried"]
    assert small_data.multiplier(real, generated) == worth
    assert small_data.multiplier(real, {1_000: [5.0]}) == ["5.0"]


def test_copula_and_independent_columns():
    """Both keep the distributions of the columns. The first keeps their correlations too."""
    torch.manual_seed(0)
    x = torch.randn(5_000, 1)
    rows = torch.cat([x.exp(), x + 0.5 * torch.randn_like(x), torch.zeros_like(x)], dim=1)
    rho = []
    for samples in (rows, table1.copula(rows, 4_000), table1.independent(rows, 4_000)):
        assert edm.marginal(rows, samples) > 0.98 and (samples[:, 2] == 0).all()
        rho.append(spearmanr(samples[:, 0], samples[:, 1])[0])
    assert rho[0] > 0.8 and rho[1] == pytest.approx(rho[0], abs=0.02) and abs(rho[2]) < 0.06


def test_recipes_trains_its_variations():
    fast = edm.RECIPES["fast"]
    plain = replace(edm.Recipe(), depth=2, residual=False)
    cases = [("paper, plain MLP, depth 2", plain, -1.2), ("P_mean -2.0", fast, -2.0)]
    for name, recipe, p_mean in cases:
        model = recipes.train(torch.randn(1_001, 4), name, 1)
        assert model.recipe == replace(recipe, ema_decay=model.recipe.ema_decay)
        assert model.P_MEAN == p_mean
