"""The benchmarks' commands run end to end, and the tables are what the result files give."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ACDC = os.environ.get("KNOWSAM_ACDC_DIR")


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """The modules of the folder, with results in a folder of the test."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import grid
    import hosts
    import tables

    monkeypatch.setattr(grid, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return grid, hosts, tables


def lines(row, dice):
    """Lines of a result file; dice: {(seed, patient): Dice of the only class}."""
    return [
        {"row": row, "seed": str(seed), "volume": f"{patient}_frame01", "dice heart": str(value)}
        for (seed, patient), value in dice.items()
    ]


def test_a_gain_and_its_error_are_those_of_a_calculation_by_hand(benchmarks):
    tables = benchmarks[2]
    without = lines("Mean Teacher", {(0, "a"): 50, (0, "b"): 60, (1, "a"): 40, (1, "b"): 70})
    with_skd = lines("Mean Teacher + SKD", {(0, "a"): 53, (0, "b"): 61, (1, "a"): 47, (1, "b"): 73})
    # differences: seed 0: 3 and 1, seed 1: 7 and 3; patients: 5 and 2, seeds: 2 and 5; both have error 1.5
    two_seeds = tables.gain(with_skd, without, ["heart"])
    assert two_seeds == (pytest.approx(3.5), pytest.approx(1.5 * 2**0.5), 2)
    assert tables.gain_text(*two_seeds) == "+3.5 ± 2.1, not distinguishable"
    one_seed = tables.gain(with_skd[:2], without, ["heart"])
    assert one_seed == (pytest.approx(2), pytest.approx(1), 1)


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        ((2.1, 1.0, 2), "+2.1 ± 1.0"),
        ((2.1, 1.0, 1), "+2.1 ± 1.0 (patients only)"),
        ((-2.0, 1.0, 3), "-2.0 ± 1.0, not distinguishable"),
        ((2.04, 0.96, 2), "+2.0 ± 1.0, not distinguishable"),
        ((0, 0), "+0.0 ± 0.0 (patients only), not distinguishable"),
    ],
)
def test_a_gain_is_printed_with_its_error_and_verdict(benchmarks, gain, text):
    assert benchmarks[2].gain_text(*gain) == text


def test_tables_have_the_gain_in_each_class_and_count_undefined_distances(benchmarks):
    _, _, tables = benchmarks
    tables.RESULTS.mkdir()
    head = "row,seed,volume,dice left,hd95 left,asd left,dice right,hd95 right,asd right\n"
    (tables.RESULTS / "trial.csv").write_text(
        f"{head}BCP,0,a_1,50,2,1,20,,\nBCP,0,b_1,60,4,3,30,,\n"
        "BCP + SKD,0,a_1,53,2,1,21,8,5\nBCP + SKD,0,b_1,61,2,1,36,,\n"
        "CPS,1,a_1,1,1,1,1,1,1\nCPS + SKD,0,a_1,1,1,1,1,1,1\n"
    )
    curves = "".join(f"{row},0,9,1.0\n" for row in ("BCP", "BCP + SKD", "CPS", "CPS + SKD"))
    (tables.RESULTS / "trial_curves.csv").write_text(f"row,seed,iteration,minutes\n{curves}")
    lines = tables.table_of("trial").splitlines()
    # gains by patient: left 3 and 1, right 1 and 6
    assert lines[2] == "| BCP | 40.0 | - | 55.0 | 25.0 | 3.0 | 2.0 | 2 of 4 | - | 0 | 1 |"
    assert lines[3].startswith("| BCP + SKD | 42.8 | +2.8 ± 0.7 (patients only) | 57.0 | 28.5 | 3.5 | 2.0 | 1 of 4 |")
    assert lines[5].startswith("| CPS + SKD | 1.0 | - |")  # no seed in common
    undistinguished = "+2.0 ± 1.0 (patients only), not distinguishable"
    assert tables.table_of("trial_classes").splitlines()[2:] == [
        f"| BCP + SKD | {undistinguished} | +3.5 ± 2.5 (patients only), not distinguishable | 0 |"
    ]
    assert tables.table_of("trial_summary").splitlines()[2:] == [
        "| BCP | 40.0 | 42.8 | +2.8 ± 0.7 (patients only) | 0 |"
    ]


def test_marks_without_a_result_file_have_nothing_between_them(benchmarks):
    marks = "<!-- table acdc_3_published_classes -->\n", "<!-- end acdc_3_published_classes -->"
    assert benchmarks[2].with_tables("of other results\n".join(marks)) == "".join(marks)


def finished_by(command, log, gpu):
    """What a training and an evaluation leave that have Dice 0.5 of one volume and class."""
    folder = log.parent
    log.write_text("done\n")
    (folder / "last_model_epoch=1.pt").touch()
    (folder / "results.csv").write_text("epoch,val_mean_dice\n1,0.5\n")
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "metrics_raw.csv").write_text(
        "case,components,class,dice,hd95_voxel,asd_voxel\na_1,all,heart,0.5,1,1\n"
    )


def rows_named(grid, *names):
    return [(grid.Row(name, (), {"epoch_length": 1, "use_sam": False}), 0) for name in names]


def test_a_failed_row_loses_no_results_and_starts_no_other(benchmarks, monkeypatch, capsys):
    grid, _, tables = benchmarks

    def run(command, log, gpu):
        assert "third" not in str(log)
        if "second" in str(log):
            log.write_text("Traceback\n")
            grid.real_run([sys.executable, "-c", "print('first\\nOSError: why.\\n the remedy\\n'); exit(3)"], log, gpu)
        finished_by(command, log, gpu)

    monkeypatch.setattr(grid, "real_run", grid._run, raising=False)
    monkeypatch.setattr(grid, "_run", run)
    with pytest.raises(
        SystemExit, match=r"^A row failed \(second, seed 0\), so no more were started; 1 of 3 rows are done, "
    ):
        grid.run_all("trial", rows_named(grid, "first", "second", "third"), "data")
    said = capsys.readouterr().out
    assert "second, seed 0: exit code 3: OSError: why. (log: " in said
    assert "| first | 50.0 | - | 50.0 | 1.0 | 1.0 | 0 of 1 |" in said
    assert "first,0,a_1,50.00" in (tables.RESULTS / "trial.csv").read_text()


def test_results_are_written_when_a_row_ends_in_the_order_of_the_grid(benchmarks, monkeypatch):
    grid, _, tables = benchmarks
    written = []

    def run(command, log, gpu):
        file = tables.RESULTS / "trial.csv"
        written.append(file.read_text().count("\n") - 1 if file.is_file() else 0)
        finished_by(command, log, gpu)

    monkeypatch.setattr(grid, "_run", run)
    grid.run_all("trial", rows_named(grid, "b", "a"), "data")
    assert written == [0, 0, 1, 1]  # before the training and the evaluation of each row
    assert [line[:2] for line in (tables.RESULTS / "trial.csv").read_text().splitlines()[1:]] == ["b,", "a,"]


def test_missing_weights_of_sam_are_said_before_the_first_row_that_could_run(benchmarks, monkeypatch, tmp_path):
    grid, hosts, _ = benchmarks
    words = ["--published", "--hosts", "supervised", "--sam_checkpoint", str(tmp_path / "none.pth")]
    rows = hosts.rows_of(hosts.parser().parse_args(words), 3)
    assert [row.name for row, _ in rows] == ["supervised", "supervised + SKD"]
    monkeypatch.setattr(grid, "_run", None)
    with pytest.raises(
        SystemExit, match=r"^`sam_checkpoint` must be a file .*none.pth does not exist; get it with `curl"
    ):
        grid.run_all("trial", rows, "data")
    grid.check_sam(rows[:1])
    grid.check_sam(hosts.rows_of(hosts.parser().parse_args([]), 3))  # of the stand-in


@pytest.mark.parametrize(
    ("inherited", "count", "names"), [("5,7", 2, "57"), (None, 2, "01"), ("", 0, ""), ("6,5", 1, "6")]
)
def test_rows_take_the_gpus_that_the_user_left_to_them(benchmarks, monkeypatch, inherited, count, names):
    grid = benchmarks[0]
    monkeypatch.setattr(grid.torch.cuda, "device_count", lambda: count)
    if inherited is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    assert grid.visible_gpus() == list(names)


def test_minutes_of_every_start_count_also_of_one_that_was_killed(benchmarks, tmp_path):
    grid, clock, log = benchmarks[0], tmp_path / "clock.json", tmp_path / "log.txt"
    assert grid.earlier_minutes(clock, log) == 0
    clock.write_text(json.dumps({"minutes": 5, "started": 1000}))
    assert grid.earlier_minutes(clock, log) == 5
    log.touch()
    os.utime(log, (1180, 1180))  # its last line came three minutes after the start
    assert grid.earlier_minutes(clock, log) == 8


def test_the_published_protocol_has_a_table_for_each_number_of_labeled_patients(benchmarks, monkeypatch):
    hosts, grids = benchmarks[1], []
    monkeypatch.setenv("KNOWSAM_ACDC_DIR", "data")
    monkeypatch.setattr(hosts, "load_datalist", lambda *args, **kwargs: {"test": []})
    monkeypatch.setattr(hosts, "run_all", lambda table, rows, *args, **kwargs: grids.append((table, rows)))
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    words = next(line.split("hosts.py ")[1] for line in makefile.splitlines() if "hosts.py " in line)
    monkeypatch.setattr(sys, "argv", ["hosts.py", *shlex.split(words.replace("$(ARGS)", ""))])
    hosts.main()
    assert [(table, len(rows)) for table, rows in grids] == [("acdc_3_published", 14), ("acdc_7_published", 14)]
    assert [{row.keys["labeled_patients"] for row, _ in rows} for _, rows in grids] == [{3}, {7}]


def test_shortened_runs_do_not_take_the_place_of_the_tables(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks[1], "run_all", None)
    for words in (["--iterations", "4"], ["--set", "seed=3"]):
        monkeypatch.setattr(sys, "argv", ["hosts.py", *words])
        with pytest.raises(SystemExit):
            benchmarks[1].main()
        assert f"with `{words[0]}` give a `--table`, the name of other result files" in capsys.readouterr().err


def test_a_class_that_is_absent_from_a_volume_is_left_out_of_its_mean(benchmarks):
    volumes = [{"dice left": "80", "dice right": ""}, {"dice left": "40", "dice right": "20"}]
    assert benchmarks[2].mean_of(volumes, "dice", ["left", "right"]) == pytest.approx((80 + 30) / 2)


def test_the_tables_in_the_pages_are_those_of_the_result_files(benchmarks):
    pages = [page.read_text(encoding="utf-8") for page in benchmarks[2].PAGES]
    assert all("<!-- table acdc_3_cpu" in page and "| Mean Teacher |" in page for page in pages)
    done = subprocess.run([sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not ACDC, reason="KNOWSAM_ACDC_DIR is not set")
def test_no_patient_of_the_tables_is_in_training(benchmarks):
    grid = benchmarks[0]
    table, choices = (json.loads(grid.acdc_lists(3, name).read_text()) for name in ("tables", "choices"))
    measured, chosen = ({item["patient"] for item in data["validation"]} for data in (table, choices))
    assert (len(measured), len(table["validation"]), len(chosen)) == (30, 60, 20)
    assert not measured & chosen
    for data in (table, choices):
        trained = {item["patient"] for part in ("labeled", "unlabeled") for item in data[part]}
        assert not trained & (measured | {grid.TWIN})  # his images are those of one of them
    assert not any("label" in item for item in table["unlabeled"])
    most = json.loads(grid.acdc_lists(49).read_text())
    assert len({item["patient"] for item in most["labeled"]}) == 49 and not most["unlabeled"]
    with pytest.raises(ValueError, match="must be at most 49, the patients left for training, but is 50"):
        grid.acdc_lists(50)


@pytest.mark.slow
@pytest.mark.skipif(not ACDC, reason="KNOWSAM_ACDC_DIR is not set")
@pytest.mark.parametrize("protocol", ["cpu", "published"])
def test_a_grid_runs_from_training_to_the_result_files_and_resumes(benchmarks, monkeypatch, protocol, capsys):
    grid, hosts, tables = benchmarks
    tiny = ["image_size=32", "max_iterations=2", "epoch_length=1", "num_workers=0", "sam_variant=stand_in"]
    tiny += ["labeled_batch_size=1", "unlabeled_batch_size=1"]
    words = ["hosts.py", "--hosts", "Mean Teacher", "--table", "trial", "--set", *tiny]
    monkeypatch.setattr(sys, "argv", words + ["--published", "--labeled_patients", "3"] * (protocol == "published"))
    hosts.main()
    with open(tables.RESULTS / "trial.csv", newline="") as file:
        volumes = list(csv.DictReader(file))
    assert {(line["row"], line["seed"]) for line in volumes} == {("Mean Teacher", "0"), ("Mean Teacher + SKD", "0")}
    assert len(volumes) == 2 * (20 if protocol == "published" else 60)
    with open(tables.RESULTS / "trial_curves.csv", newline="") as file:
        points = list(csv.DictReader(file))
    assert [(line["row"], line["iteration"]) for line in points] == [
        (row, number) for row in ("Mean Teacher", "Mean Teacher + SKD") for number in "12"
    ]
    assert bool(points[-1]["teacher_dice"]) and not points[0]["teacher_dice"]
    # a second start trains nothing: it would fail where no command can be run
    monkeypatch.setattr(grid, "_run", None)
    hosts.main()
