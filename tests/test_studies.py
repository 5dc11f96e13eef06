"""The parts of the studies (tests/paper) that could give a wrong figure without an error."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import edm

sys.path.append(str(Path(edm.__file__).parent / "tests/paper"))
import runs  # noqa: E402
import small_data  # noqa: E402
import table1  # noqa: E402

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
"""


def test_run_is_made_once_and_goes_on(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = runs.run(tmp_path, "one", tmp_path / "script.py", seed=3)
    assert json.loads((folder / "args.json").read_text()) == {"seed": 3}
    (tmp_path / "script.py").write_text("raise SystemExit(2)")
    assert runs.run(tmp_path, "one", tmp_path / "script.py", seed=3) == folder
    with pytest.raises(SystemExit, match="was made with another seed"):
        runs.run(tmp_path, "one", tmp_path / "script.py", seed=4)
    with pytest.raises(SystemExit, match="two has failed"):
        runs.run(tmp_path, "two", tmp_path / "script.py", seed=3)


def test_results_outlive_their_runs(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    script = str(tmp_path / "script.py")
    values = runs.result(tmp_path / "results.jsonl", "one", script, seed=3)
    assert values == dict(return_mean=20, score=2, c2st=0.6)  # of the last three evaluations
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "script.py").unlink()
    assert runs.result(tmp_path / "results.jsonl", "one", script, seed=3)["score"] == 2
    with pytest.raises(SystemExit, match="has another one"):
        runs.result(tmp_path / "results.jsonl", "one", script, seed=4)


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
    """5,000 rows with the score of 10,000 real ones are worth twice their number. 0 and inf: beyond what was tried."""
    real = [np.array(x) for x in ([1.0, 3.0], [5.0, 5.0], [9.0, 11.0, 10.0])]
    generated = [np.array(x) for x in ([0.0, 1.0], [10.0, 10.0, 10.0], [12.0, 12.0])]
    assert small_data.multiplier((2_500, 5_000, 10_000), real, generated) == [
        "0.0 (0.0 to 0.0)", "2.0 (1.8 to inf)", "inf (inf to inf)"
    ]  # fmt: skip


def test_copula_and_independent_columns():
    """Both keep the distributions of the columns, and the first their correlations, the second none."""
    torch.manual_seed(0)
    x = torch.randn(5_000, 1)
    rows = torch.cat([x.exp(), x + 0.5 * torch.randn_like(x), torch.zeros_like(x)], dim=1)
    copula, independent = table1.copula(rows, 4_000), table1.independent(rows, 4_000)
    for samples in (copula, independent):
        assert edm.marginal(rows, samples) > 0.98 and (samples[:, 2] == 0).all()
    rho, rho_copula, rho_independent = (spearmanr(x[:, 0], x[:, 1])[0] for x in (rows, copula, independent))
    assert rho > 0.8 and rho_copula == pytest.approx(rho, abs=0.02) and abs(rho_independent) < 0.06
