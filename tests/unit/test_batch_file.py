import gzip
import json
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dsv3.errors import ConfigError
from dsv3.serve import batch_file
from dsv3.serve.batch_file import BatchInput, Row, result_line
from dsv3.text.defaults import Defaults, Sampling


def row(custom_id: str, **body: Any) -> str:
    body = {"messages": [{"role": "user", "content": "Hi"}]} | body
    url = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    if "prompt" in body:
        del body["messages"]
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def read(path: Path, text: str | bytes, separator: str = "line") -> list[Row]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    batch = BatchInput(path, Defaults(), separator)
    rows = list(batch)
    assert batch.count() == len(rows)
    return rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.txt"


def prompts(rows: list[Row]) -> list[tuple[str, Any]]:
    return [
        (
            row.custom_id,
            row.request and row.request.messages and row.request.messages[-1]["content"],
        )
        for row in rows
    ]


def test_one_prompt_a_line(path: Path) -> None:
    rows = read(path, "\n  What?  \r\n\n{not json}\nlast")
    assert prompts(rows) == [("line-2", "  What?  "), ("line-4", "{not json}"), ("line-5", "last")]


def test_prompts_separated_by_blank_lines(path: Path) -> None:
    rows = read(path, "\n\none\n  two\n \t\n\nthree\n", "blank-line")
    assert prompts(rows) == [("line-3", "one\n  two"), ("line-7", "three")]


@pytest.mark.parametrize("separator", ["line", "blank-line"])
def test_jsonl_is_recognized_by_its_first_line(path: Path, separator: str) -> None:
    rows = read(path, f"\n{row('a')}\n\n{row('b', prompt=[1, 2])}\n", separator)
    assert [(r.custom_id, r.number, r.error) for r in rows] == [("a", 2, None), ("b", 4, None)]
    assert rows[1].request and rows[1].request.prompt == [1, 2]


def test_a_broken_first_row_does_not_make_rows_prompts(path: Path) -> None:
    rows = read(path, f'{{"custom_id": "a", "body": \n{row("b")}\n')
    assert [(r.custom_id, r.error is None) for r in rows] == [("line-1", False), ("b", True)]
    named = read(path.with_suffix(".jsonl"), f"oops\n{row('b')}\n")
    assert [r.error is None for r in named] == [False, True]


def test_a_byte_order_mark_is_no_text(path: Path) -> None:
    assert prompts(read(path, b"\xef\xbb\xbfHi\n")) == [("line-1", "Hi")]
    assert read(path, b"\xef\xbb\xbf" + row("a").encode())[0].custom_id == "a"


def test_an_empty_file_has_no_rows(path: Path) -> None:
    assert read(path, "\n \n") == []


def test_rows_are_read_as_they_are_needed(path: Path) -> None:
    # Python keeps some freed tuples of every row for reuse, less than a kilobyte each.
    num_rows, size = 500, 30_000
    path.write_text("".join(f"{row(f'r{i}', prompt='x' * size)}\n" for i in range(num_rows)))
    next(iter(BatchInput(path, Defaults())))  # imports and caches are not counted
    tracemalloc.start()
    assert sum(1 for r in BatchInput(path, Defaults()) if r.request) == num_rows
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < num_rows * size / 10


@pytest.mark.parametrize("separator", ["line", "blank-line"])
def test_a_row_beyond_all_measure_is_not_read(
    path: Path, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_file, "MAX_ROW_BYTES", 1 << 20)
    with path.open("wb") as file:
        file.write(b"one\n\n")
        for _ in range(4):
            file.write(b"x" * (20 << 20) + b"\n")
        file.write(b"\n" + b" " * (20 << 20) + b"\nlast\n\n")
        file.write(b"y" * (1 << 20))
    tracemalloc.start()
    batch = BatchInput(path, Defaults(), separator)
    rows = [(row.number, row.error) for row in batch]
    assert batch.count() == len(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    long = range(3, 7) if separator == "line" else [3]
    assert rows == [
        (1, None),
        *((number, "longer than 1 MiB") for number in long),
        (9, None),
        (11, None),
    ]
    assert peak < 20 << 20


def test_a_key_given_twice_is_found_among_many(path: Path) -> None:
    fields = ", ".join(f'"k{i}": 0' for i in range(100_000))
    (row,) = read(path.with_suffix(".jsonl"), f'{{{fields}, "k99999": 1}}')
    assert row.error == "k99999 is given twice"


def test_a_repeated_id_is_that_rows_error(path: Path) -> None:
    rows = read(path, f"{row('a')}\n{row('a')}\n{row('a')}\n")
    assert [r.error for r in rows] == [None, *['custom_id="a" was used before, in row 1'] * 2]
    assert len({r.key for r in rows}) == 3


def test_an_id_is_used_up_even_by_a_bad_row(path: Path) -> None:
    rows = read(path, f"{row('a', n=0)}\n{row('a')}\n")
    assert rows[0].error == "n=0 must be a whole number from 1 to 128"
    assert rows[1].error == 'custom_id="a" was used before, in row 1'


def test_a_row_without_an_id_never_passes_for_another(path: Path) -> None:
    rows = read(path, f"{row('line-2')}\n{{broken\n{row('c')}\n")
    assert [r.custom_id for r in rows] == ["line-2", "line-2", "c"]
    assert len({r.key for r in rows}) == 3


def test_digests_tell_content_not_place_or_spelling(path: Path) -> None:
    a, b = row("a", max_tokens=5), row("b", max_tokens="x")
    first = {r.custom_id: r.digest for r in read(path, f"{a}\n{b}\n")}
    spelled = json.dumps(json.loads(a), indent=None, sort_keys=True, separators=(" ,", ":  "))
    moved = {r.custom_id: r.digest for r in read(path, f"{b} \n\n{spelled}\n")}
    assert first == moved
    assert read(path, row("a", max_tokens=6))[0].digest != first["a"]


def test_result_lines_hold_any_text(path: Path) -> None:
    for custom_id in ("a", "胡\u2028\n", "\ud800"):
        rows = read(path, row(custom_id))
        line = result_line(rows[0], 200, {"text": custom_id})
        assert b"\n" not in line
        assert json.loads(line) == {
            "id": f"batch_req_{rows[0].digest}",
            "custom_id": custom_id,
            "response": {
                "status_code": 200,
                "request_id": rows[0].digest,
                "body": {"text": custom_id},
            },
            "error": None,
        }


@pytest.mark.parametrize(
    ("name", "separator", "error"),
    [
        ("none.txt", "line", r"--input-file .*none\.txt: No such file"),
        (".", "line", r"--input-file .*: Is a directory"),
        ("/dev/zero", "line", "--input-file /dev/zero: a device, neither a file nor a pipe"),
        ("x" * 5000, "line", "--input-file .*x: File name too long"),
        ("rows.txt", "tab", "--prompt-separator=tab is unknown; use line or blank-line"),
    ],
)
def test_input_that_cannot_be_read(tmp_path: Path, name: str, separator: str, error: str) -> None:
    (tmp_path / "rows.txt").touch()
    with pytest.raises(ConfigError, match=error):
        BatchInput(tmp_path / name, Defaults(), separator)


def test_a_pipe_is_read_once_and_its_rows_as_often_as_needed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = f"{row('a')}\n" * 3 + "x" * 200_000
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(pipe.write_text, text)
        batch = BatchInput(pipe, Defaults())
        writing.result(10)
    assert batch.is_jsonl
    assert [r.number for r in batch] == [r.number for r in batch] == [1, 2, 3, 4]
    first, second = iter(batch), iter(batch)
    assert [next(first).number, next(second).number, next(first).number] == [1, 1, 2]
    assert batch.count() == 4


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be", "utf-8-sig"])
def test_byte_order_marks_tell_the_encoding(path: Path, encoding: str) -> None:
    rows = row("a", prompt="caf\u00e9 \U0001f600") + "\r\n" + row("b")
    mark = "\ufeff" if encoding.endswith("-be") else ""
    found = read(path, (mark + rows).encode(encoding))
    plain = read(path, rows)
    assert [r.custom_id for r in found] == ["a", "b"]
    assert found == plain
    words = read(path, (mark + "caf\u00e9\n\nHi").encode(encoding))
    assert prompts(words) == [("line-1", "caf\u00e9"), ("line-3", "Hi")]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (
            "one\ntwo\n".encode("utf-16") + b"\x00\xd8\n\0",
            "line 3: not UTF-16-LE, as the byte order",
        ),
        ("one\ntwo".encode("utf-16") + b"x", "line 2: not UTF-16-LE"),
        ('{"custom_id"'.encode("utf-16-le"), "line 1: UTF-16 without a byte order mark"),
        ("What?".encode("utf-16-be"), r"line 1: UTF-16 .* \(iconv -f UTF-16BE -t UTF-8\)"),
        (
            gzip.compress(b"rows", mtime=0),
            r"compressed with gzip, not text; unpack it first \(gunzip -k .*txt",
        ),
        (b"\x28\xb5\x2f\xfd\x04\0", "compressed with zstd"),
        (b"PK\3\4\x14\0", "a zip archive or an Excel workbook, not text"),
        (b"PAR1\x15\4\0", "a Parquet file, not text; write it as JSON Lines first, one row a line"),
        (b"x" + b"\0" * 256 + b"ustar\0", "a tar archive"),
        (b"one\rtwo\r", "its lines end in CR alone"),
    ],
)
def test_binary_files_are_refused_with_their_format(path: Path, data: bytes, error: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"^--prewarm .*rows.txt: {error}"):
        BatchInput(path, Defaults(), flag="--prewarm")


ROWS = [json.loads(row("a")), json.loads(row("b"))]
PRETTY = json.dumps(ROWS[0], indent=1)


@pytest.mark.parametrize("separator", ["line", "blank-line"])
@pytest.mark.parametrize("name", ["rows.txt", "rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n" + json.dumps(ROWS).replace("}, {", "},\n{"),
        json.dumps(ROWS * 10_000, indent=1),
        json.dumps(ROWS, indent=2)[:-30],  # cut off
        json.dumps([{"prompt": "Hi"}]),
        PRETTY,
        f"{PRETTY}\n{PRETTY}\n",
        PRETTY.replace(":", "", 1),  # damaged
    ],
)
def test_json_in_another_form_is_refused_as_a_whole(
    tmp_path: Path, name: str, separator: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(
        ConfigError, match=r"JSON with .*; a batch has one row a line .`jq -c .*writes"
    ):
        BatchInput(tmp_path / name, Defaults(), separator)


@pytest.mark.parametrize("text", ['{\n "a": 1\n}', '[\n "a",\n "b"\n]', '["a",\n"b"]'])
def test_any_json_over_several_lines_is_no_list_of_prompts(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match="one row a line"):
        BatchInput(path, Defaults())
    assert len(read(path, f"{text}\nExplain this.", "blank-line")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[INST] Hi [/INST]",
        "[1, 2",
        "[1], what is this?",
        '{"a": 1} is JSON',
        '{"a": 1}',
        '["a", "b"]',
        "{not json}",
        "{",
        "[1, 2, 3]\n[4]",
    ],
)
def test_prompts_may_look_like_json(path: Path, text: str) -> None:
    expected = [(f"line-{i}", line) for i, line in enumerate(text.split("\n"), 1)]
    assert prompts(read(path, text)) == expected


def test_rows_in_a_file_named_json(path: Path) -> None:
    rows = read(path.with_suffix(".json"), f"{row('a')}\n[1, 2]\noops\n")
    assert [r.error is None for r in rows] == [True, False, False]
    assert read(path, '{"messages": []}\n')[0].error == "custom_id is missing"


def test_files_put_together_have_marks_inside(path: Path) -> None:
    mark = "\ufeff"
    rows = read(path, f"{mark}{row('a')}\n{mark}{row('b')}\n")
    assert [(r.custom_id, r.error) for r in rows] == [("a", None), ("b", None)]


def test_a_line_of_nul_characters_is_no_prompt(path: Path) -> None:
    rows = read(path, b"Hi\nwh\0at\n\0\0")
    assert [r.error for r in rows] == [None, None, "nothing but NUL characters"]


def test_flags_out_of_range_are_not_left_to_the_rows() -> None:
    with pytest.raises(ConfigError, match=r"^--temperature=1000 must be between 0 and 100"):
        Defaults(flags=Sampling(temperature=1000))
    with pytest.raises(ConfigError, match=r"^--max-new-tokens=-1 must be from 0"):
        Defaults(flags=Sampling(max_tokens=-1))
    with pytest.raises(ConfigError, match=r"generation_config\.json: top_p=2 must be above 0"):
        Defaults(model=Sampling(top_p=2))
