"""`dynctl estimate`: a prediction for each row, never from what was measured; a broken row stops nothing."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from dynctl.cli.main import dispatch

DATA = Path(__file__).resolve().parent.parent / "data" / "serving_points.csv.gz"
HEAD = "row_id,model,system,backend,mode,isl,osl,concurrency,tp"
GOOD = "7,meta-llama/Llama-3.1-70B,h200_sxm,vllm,agg,1024,1024,16,4"


@pytest.fixture(scope="module")
def measured() -> list[dict[str, str]]:
    """Every 40th row of the measured points."""
    with gzip.open(DATA, "rt", newline="") as file:
        return list(csv.DictReader(file))[::40]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(tmp_path: Path, text: str, *options: str) -> tuple[int, list[dict[str, str]]]:
    (tmp_path / "points.csv").write_text(text)
    code = dispatch(["estimate", str(tmp_path / "points.csv"), "--out", str(tmp_path / "told.csv"), *options])
    return code, read(tmp_path / "told.csv") if code == 0 else []


def test_each_measured_row_is_predicted_near_what_was_measured(
    tmp_path: Path, measured: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "told.csv"
    points = write(tmp_path / "points.csv", measured)
    assert dispatch(["estimate", str(points), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predicted"] == told["rows"] == len(measured)
    total = told["errors"][-1]
    assert total["engine"] == "all"
    assert total["tpot_median_error"] < 0.15
    assert total["ttft_median_error"] < 0.35
    assert [row["model"] for row in read(out)] == [row["model"] for row in measured]


def test_what_was_measured_is_never_looked_at(tmp_path: Path, measured: list[dict[str, str]]) -> None:
    hidden = ("ttft_ms", "tpot_ms", "output_tok_s", "output_tok_s_per_gpu")
    bare = [{k: v for k, v in row.items() if k not in hidden} for row in measured]
    wrong = [{**row, **dict.fromkeys(hidden, "1")} for row in measured]
    found = []
    for name, rows in (("as-is", measured), ("bare", bare), ("wrong", wrong)):
        points = write(tmp_path / f"{name}.csv", rows)
        assert dispatch(["estimate", str(points), "--out", str(tmp_path / f"{name}.out")]) == 0
        found.append([(row["ttft_ms"], row["tpot_ms"]) for row in read(tmp_path / f"{name}.out")])
    assert found[0] == found[1] == found[2]


def test_unknown_columns_are_carried_over_and_errors_need_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = run(tmp_path, f"{HEAD}\n{GOOD}\n")
    assert code == 0
    assert rows[0]["row_id"] == "7"
    assert rows[0]["reason"] == ""
    assert float(rows[0]["ttft_ms"]) > float(rows[0]["tpot_ms"]) > 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "1 of 1 rows predicted" in shown.err


def test_errors_are_a_table_by_engine_and_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, f"{HEAD},ttft_ms,tpot_ms\n{GOOD},120,11\n{GOOD},,\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "ENGINE", "GPU", "MODE", "POINTS", "TTFT", "ERROR", "P90", "TPOT", "ERROR", "P90",
    ]  # fmt: skip
    assert lines[1].split()[:4] == ["vllm", "h200_sxm", "agg", "1"]
    assert lines[2].split()[:2] == ["all", "1"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD.replace("h200_sxm", "h20"), "unknown GPU 'h20' (did you mean H200? known: A100, B200, B300"),
        (GOOD.replace("1024,16", "0,16"), "osl is '0' (a whole number of 1 or more)"),
        (GOOD.replace(",16,", ",many,"), "concurrency is 'many' (a whole number of 1 or more)"),
        (GOOD.replace(",16,", ",16.5,"), "concurrency is '16.5' (a whole number of 1 or more)"),
        (GOOD.replace(",16,", ",,"), "concurrency is blank (a whole number of 1 or more)"),
        (GOOD.replace(",16,", ",nan,"), "concurrency is 'nan' (a whole number of 1 or more)"),
        (GOOD.replace("agg", "both"), "mode is 'both' (agg or disagg)"),
        (GOOD.replace("vllm", ""), "backend is blank (the engine's name)"),
        (GOOD.replace("meta-llama/Llama-3.1-70B", ""), "model is blank (a directory"),
        (
            GOOD.replace("Llama-3.1-70B", "Llama-3.1-71B"),
            "model 'meta-llama/Llama-3.1-71B' has no config: no such directory, not in the local hub cache, "
            "not in the table of known models (did you mean meta-llama/llama-3.1-70b?)",
        ),
        (GOOD[:-1] + "3", "TP3: 64 attention heads do not divide by TP3"),
        (GOOD[:-1] + "1", "TP1: 141 GB of weights a GPU do not fit on 141 GB H200 (more GPUs"),
        (GOOD + ",8", "the row has 10 cells, the header 9"),
    ],
)
def test_a_broken_row_tells_what_is_wrong_and_the_run_goes_on(
    tmp_path: Path, row: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = run(tmp_path, f"{HEAD}\n{row}\n{GOOD}\n")
    assert code == 0
    assert rows[0]["reason"].startswith(reason)
    assert rows[0]["ttft_ms"] == rows[0]["tpot_ms"] == ""
    assert rows[1]["ttft_ms"]
    assert f"points.csv:2: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "points.csv:1: lacks the columns model, system, backend, mode, isl, osl, concurrency, tp (needed",
        ),
        (HEAD.replace(",tp", "") + "\n", "points.csv:1: lacks the columns tp (needed are model, system"),
    ],
)
def test_missing_columns_are_one_message(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, text)[0] == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "told.csv").exists()


def test_missing_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["estimate", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out.csv")]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/none.csv: cannot read the points: No such file or directory\n"
    )


def test_points_are_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = tmp_path / "points.csv"
    points.write_text(f"{HEAD}\n{GOOD}\n")
    assert dispatch(["estimate", str(points), "--out", str(points)]) == 1
    assert "would be written over the points" in capsys.readouterr().err
    assert points.read_text() == f"{HEAD}\n{GOOD}\n"


def test_a_model_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    row = GOOD.replace("meta-llama/Llama-3.1-70B", str(tmp_path / "model"))
    _, rows = run(tmp_path, f"{HEAD}\n{row}\n")
    assert float(rows[0]["tpot_ms"]) > 0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    _, rows = run(tmp_path, f"{HEAD}\n{row}\n")
    assert "config.json: the config of" in rows[0]["reason"]
    assert "lacks intermediate_size" in rows[0]["reason"]
