"""Documents carry no number without a results file, and nothing of a dry run."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from bench_scripts import ROOT, script

pytest.importorskip("matplotlib")

import report  # isort: skip


def test_documents_are_generated_from_the_results():
    done = script("report", "--check")
    assert done.returncode == 0, done.stderr


GENERATED = ("PAGE", "HARDWARE", "README", "SPARSE")


def move_to(folder, monkeypatch):
    """Lets report.py work in another folder."""
    for name in (*GENERATED, "HERE"):
        path = getattr(report, name).relative_to(report.ROOT)
        monkeypatch.setattr(report, name, folder / path)
    monkeypatch.setattr(report, "ROOT", folder)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What report.py reads and writes, with the results of two operators: pictures of all take
    seconds."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(report.HERE / "results", folder / "benchmarks" / "results")
    (folder / "docs" / "kernels").mkdir(parents=True)
    for path in (getattr(report, name) for name in GENERATED):
        shutil.copy(path, folder / path.relative_to(ROOT))
    file = folder / "benchmarks" / "results" / "cpu" / "ops.json"
    record = json.loads(file.read_text())
    record["rows"] = [r for r in record["rows"] if r["op"] in ("gla", "attn")]
    file.write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as monkeypatch:
        move_to(folder, monkeypatch)
        assert run(monkeypatch, "--check") == 1
        assert run(monkeypatch) == 0
    return folder


@pytest.fixture
def copy(tree, tmp_path, monkeypatch):
    shutil.copytree(tree, tmp_path, dirs_exist_ok=True)
    move_to(tmp_path, monkeypatch)
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report.py", *arguments])
    return report.main()


PAGES = ["docs/performance.md", "README.md", "docs/kernels/sparse.md"]


@pytest.mark.parametrize("what", [*PAGES, "json", "picture"])
def test_any_difference_is_noticed(copy, monkeypatch, capsys, what):
    assert run(monkeypatch, "--check") == 0
    results = copy / "benchmarks" / "results" / "cpu"
    if what == "json":
        record = json.loads((results / "ops.json").read_text())
        record["rows"] = [r | {"ms": 7 * r["ms"]} if "ms" in r else r for r in record["rows"]]
        (results / "ops.json").write_text(json.dumps(record))
    elif what == "picture":
        (results / "time.png").write_bytes(b"\x89PNG another")
    else:
        path = copy / what
        text = re.sub(r"\d\.\d+(×|% \|)", r"99.9\1", path.read_text(), count=1)
        assert text != path.read_text()
        path.write_text(text)
    assert run(monkeypatch, "--check") == 1
    assert "run benchmarks/report.py" in capsys.readouterr().err
    assert run(monkeypatch) == 0 and run(monkeypatch, "--check") == 0


def test_a_dry_run_is_refused(copy, monkeypatch, capsys):
    file = copy / "benchmarks" / "results" / "cpu" / "ops.json"
    record = json.loads(file.read_text())
    record["environment"]["emulated"] = True
    file.write_text(json.dumps(record))
    assert run(monkeypatch) == 1
    assert "times of a dry run on the emulator are not to be reported" in capsys.readouterr().err


def gpu_record():
    """What gpu_suite.py would write, with made-up values."""
    common = {"op": "gla", "dtype": "bfloat16", "mode": "forward", "q1": 1, "q3": 1, "min": 1}
    common |= {"samples": 5, "shape": "B1 T2048 H32 K128 V128"}
    ours = {"implementation": "lsm_cuda", "minimal_bytes": 10**9, "minimal_flops": 1}
    rows = []
    for timing, ms in (("eager", 4.0), ("graph", 2.0)):
        rows.append(common | ours | {"timing": timing, "ms": ms})
        peer = {"implementation": "FLA (Triton)", "timing": timing, "ms": 3 * ms, "ratio": 3.0}
        rows.append(common | peer)
    longer = {"shape": "B1 T32768 H32 K128 V128", "ms": 20.0}
    rows += [r | longer for r in rows if r["timing"] == "graph"]
    rows.append(common | {"implementation": "FlashInfer", "skipped": "ImportError: none"})
    items = [{"name": f"correct gla {i}", "status": s} for i, s in enumerate(("ok", "failed"))]
    items += [{"name": "correct simple_gla", "status": "ok"}, {"name": "graph gla", "status": "ok"}]
    items += [{"name": "sanitizers", "status": "skipped"}]
    rate = {"name": "wgmma rs n32", "at": "2 warpgroups", "value": 16.5, "unit": "clocks"}
    items += [{"name": "rates", "status": "ok", "rates": [rate]}]
    limits = {"bytes_per_second": 1e12, "flops_per_second": {"bfloat16": 1e15}}
    env = {"date": "2000-01-01", "commit": "abc", "gpu": "GPU", "cpu": "CPU", "threads": 1}
    env |= {"ceilings": limits, "cache_bytes": 0, "peers": {"torch": "2"}}
    return {"environment": env, "items": items, "rows": rows}


def test_a_gpu_page(copy, monkeypatch):
    folder = copy / "benchmarks" / "results" / "gpu"
    folder.mkdir()
    (folder / "ops.json").write_text(json.dumps(gpu_record()))
    assert run(monkeypatch) == 0
    page = (copy / "docs" / "performance.md").read_text()
    assert "Not timed: FlashInfer (ImportError: none)" in page
    assert "| correct | 2 | 1 | 0 |" in page
    assert "| gla | B1 T2048 H32 K128 V128 | bfloat16 | graph | 2 | 1 | 50% | 3× |" in page
    assert "| gla | B1 T2048 H32 K128 V128 | bfloat16 | eager | 4 | 1 | 25% | 3× |" in page
    assert (
        "| gla B1 T32768 H32 K128 V128 bfloat16 | 20 / – / – | 3× / – / – |"
        in (copy / "README.md").read_text()
    )


def test_what_ran_on_a_gpu(copy, monkeypatch):
    assert "No GPU has run this library yet." in (copy / "docs" / "hardware.md").read_text()
    folder = copy / "benchmarks" / "results" / "gpu"
    folder.mkdir()
    (folder / "ops.json").write_text(json.dumps(gpu_record()))
    assert run(monkeypatch) == 0
    page = (copy / "docs" / "hardware.md").read_text()
    assert re.search(r"\| gla \| yes \| failed: correct gla 1 \| yes \| – \| 3 \| 50% \|", page)
    assert re.search(r"\| simple_gla \| yes \| yes \| – \| – \| – \| – \|", page)
    assert re.search(r"\| kda \| yes \| – \| – \| – \| – \| – \|", page)
    assert "| wgmma rs n32 | 2 warpgroups | 16.5 | clocks |" in page


def test_the_readme_has_a_line_per_operator():
    """Of the cell that most implementations ran in most modes, with its own step or the best."""
    common = {"op": "gla", "dtype": "float32", "timing": "eager"}

    def rows(T: int, mode: str, *names: str):
        shape = {"shape": f"B1 T{T} H8 K64 V64", "mode": mode}
        yield common | shape | {"implementation": "lsm_cuda", "ms": 2.0}
        yield from (common | shape | {"implementation": n, "ms": 8, "ratio": 4.0} for n in names)

    result = report.Result.__new__(report.Result)
    result.rows = [
        *rows(512, "forward", "FLA naive", "torch SDPA"),
        *rows(2048, "forward", "FLA naive", "torch SDPA"),
        *rows(2048, "training", "torch SDPA"),
        *rows(8192, "forward", "torch SDPA"),
        *rows(4096, "step", "torch SDPA"),
    ]
    table = [*report.headline(result)]
    assert table[0] == "| | ours | FLA naive | torch SDPA * |"
    assert table[2:] == [
        "| gla B1 T2048 H8 K64 V64 float32; token: B1 T4096 H8 K64 V64 | 2 / 2 / 2 "
        "| 4× / – / – | 4× / 4× / 4× |"
    ]
    result.rows += rows(2048, "step")
    assert [*report.headline(result)][2].startswith("| gla B1 T2048 H8 K64 V64 float32 | 2 / 2 / 2")


UNITS = "ms|µs|us|ns|[GT]B/s|[GT]FLOP/s|tokens/s|times (?:as fast|faster|slower)|[x×] faster"
MEASURED = re.compile(rf"\d[\d.,]*\s?(?:(?:{UNITS})\b|[%×]\s*\|)")


def test_no_measured_number_outside_generated_text():
    """Times, rates, speed-ups and tables of shares stand in what report.py makes, or nowhere."""
    generated = re.compile(report.MARKED.format(r"(?P<name>\w+)", "(?P=name)"), re.DOTALL)
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"),
                 *(ROOT / "benchmarks").glob("*.md")]:  # fmt: skip
        if path == report.PAGE:
            continue
        text = generated.sub("", path.read_text())
        assert not (found := MEASURED.findall(text)), f"{path.relative_to(ROOT)}: {found}"
    some = "takes 3.5 ms, 2x faster, 4.3 TB/s | 43% | 5 % | 1.5× | within 5 %, 16 × 16 |"
    assert MEASURED.findall(some) == ["3.5 ms", "2x faster", "4.3 TB/s", "43% |", "5 % |", "1.5× |"]
