"""Captions tables as people have them: tests/cases/captions, and other spellings of the same causes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fvlm.data import parts
from fvlm.data.captions import NOT_A_CAPTION, Captions
from fvlm.data.corrupt import CORRUPT, CorruptClip, Place, known_corrupt
from fvlm.data.describe import describe
from fvlm.data.latents import BlockTransform
from fvlm.data.row_groups import RowGroups
from fvlm.data.schema import DatasetSpec, Manifest
from fvlm.data.synthetic import SMALLEST, write_videos
from fvlm.data.tables import sha256_table
from fvlm.data.video_files import NotFound, find_video
from fvlm.errors import UserError
from fvlm.train.step_lines import kept_lines, parsed_lines

CASES = Path(__file__).parent / "cases" / "captions"
SPEC = DatasetSpec(4, SMALLEST, "jpeg", "short-side", BlockTransform.name, "float16", (4, 4, 4))
SEPARATOR, NEXT_LINE = "\u2028", "\u0085"


def write_named_videos(folder: Path) -> Path:
    """The folder that the cases are about: ok.mp4 and n24.mp4, a.mp4 to d.mp4, all the same video."""
    made = write_videos(folder.parent / "made", 1, SMALLEST)
    folder.mkdir()
    for name in ("ok", "n24", *"abcd"):
        (folder / f"{name}.mp4").write_bytes((made.parent / "shapes-32-0-00000.mp4").read_bytes())
    return folder


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return write_named_videos(tmp_path / "videos")


Prepare = Callable[[Path], Manifest]


@pytest.fixture
def prepare(videos: Path, tmp_path: Path) -> Prepare:
    """Makes a dataset of the videos and a table, in one part."""

    def make(table: Path) -> Manifest:
        out, captions = tmp_path / "out", Captions(table, videos)
        with parts.exclusive(out):
            parts.begin(out, {})
            parts.prepare_part(out, videos, 0, captions.rows(0, len(captions)), SPEC, BlockTransform())
            return parts.finish(out, SPEC, 1, table)

    return make


def captions(manifest: Manifest) -> dict[str, str]:
    table = RowGroups.of(manifest).read("shard-00000.parquet", 0, ["clip_id", "caption"])
    return dict(zip(table["clip_id"].to_pylist(), table["caption"].to_pylist(), strict=True))


def rejects(manifest: Manifest) -> dict[str, str]:
    return {reject.clip_id: reject.reason for reject in parts.read_rejects(Path(manifest.root))}


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        Captions(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and len(said.splitlines()) == 1
    return said


ONE_TWO = {"a.mp4": "one", "b.mp4": "two"}


@pytest.mark.parametrize("name", ["semicolon.csv", "tab.tsv"])
def test_semicolons_and_tabs_separate_as_well(prepare: Prepare, name: str) -> None:
    manifest = prepare(CASES / name)
    assert captions(manifest) == ONE_TWO and manifest.rejected == 0


def test_blanks_in_the_header_do_not_count(prepare: Prepare) -> None:
    assert captions(prepare(CASES / "spaces_header.csv")) == {"a.mp4": "one"}


@pytest.mark.parametrize(
    "text",
    [
        'video, caption\na.mp4, "one, or 1"\nb.mp4, two\n',
        '"video";"caption"\na.mp4;"one, or 1"\n\nb.mp4;two',
        'video\t caption\r\na.mp4\t one, or 1\r\nb.mp4\ttwo\r\n',
        '\ufeff video,id,caption \na.mp4,7,"one, or 1"\nb.mp4,8,two\n',
    ],
)  # fmt: skip
def test_other_spellings_of_separators_and_blanks(tmp_path: Path, text: str) -> None:
    rows = Captions(written(tmp_path / "t.csv", text)).rows(0, 9)
    assert [(row.clip_id, row.caption, row.refused) for row in rows] == [
        ("a.mp4", "one, or 1", None),
        ("b.mp4", "two", None),
    ]


def test_a_quote_that_never_closes_is_an_error_with_its_line() -> None:
    assert "unbalanced.csv: line 2: a quote opens here and never closes" in error_of(CASES / "unbalanced.csv")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('video,caption\na.mp4,one\nb.mp4,"two\nc.mp4,"three"\nd.mp4,four\n', 3, "the next quote, in line 4"),
        ('video,caption\n"a\n.mp4","one\nb.mp4,two\n', 3, "never closes"),
        ('video,caption\r\n"a.mp4","x ""y"" z"\r\n"b.mp4","two\r\n', 3, "never closes"),
        ('video;caption\na.mp4;"say "hello" to me"\n', 2, "the next quote, in line 2"),
        ('video, caption\na.mp4, one\nb.mp4, "two\n', 3, "never closes"),
        ("video,caption\na.mp4,one\nb.mp4,\"two\n" + "c.mp4,three\n" * 20_000, 3, "never closes within 131,072"),
        ("video,caption\na.mp4,one\nb.mp4,2,3\n", 3, "3 columns, but the header has 2"),
        ("video,caption\na.mp4,one\nb.mp4\n", 3, "1 columns, but the header has 2"),
        ("video,caption\na.mp4,one\nb.mp4," + "x" * 140_000 + "\n", 3, "field larger than field limit"),
    ],
)  # fmt: skip
def test_rows_that_are_not_csv_are_named_by_their_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    said = error_of(written(tmp_path / "t.csv", text))
    assert f"t.csv: line {line}: " in said and message in said


def test_quotes_that_are_right_are_read(tmp_path: Path) -> None:
    text = 'video,caption\na.mp4,"two\nlines, ""quoted"""\nb.mp4,a 5" screen\n"c.mp4",""\n'
    rows = Captions(written(tmp_path / "t.csv", text)).rows(0, 9)
    assert [row.caption for row in rows] == ['two\nlines, "quoted"', 'a 5" screen', ""]


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    raw = (CASES / "cp1252.csv").read_bytes().splitlines()
    wrong = next(number for number, line in enumerate(raw, 1) if max(line) > 127)
    assert f"cp1252.csv: line {wrong} is not UTF-8 (byte 0x" in error_of(CASES / "cp1252.csv")
    assert "line 1 is not UTF-8" in error_of(written(tmp_path / "t.csv", "video,caption\na,b\n".encode("utf-16")))


def invalid_utf8(texts: list[bytes]) -> pa.Array:
    """A column of strings whose bytes nobody has looked at, as other writers leave them in Parquet files."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


@pytest.mark.parametrize("column", ["video", "caption"])
def test_text_in_a_parquet_file_that_is_not_utf8_is_named_by_its_row(tmp_path: Path, column: str) -> None:
    table = {"video": pa.array(["a.mp4", "b.mp4"]), "caption": pa.array(["one", "two"])}
    table[column] = invalid_utf8([b"fine", b"caf\xe9"])
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert f"row 1, column {column}: its text is not UTF-8" in error_of(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["jsonl.jsonl", "metadata.jsonl"])
def test_json_lines_are_told_from_csv(tmp_path: Path, name: str) -> None:
    assert "JSON lines are not read" in error_of(CASES / name)
    assert "JSON lines are not read" in error_of(written(tmp_path / "t.csv", (CASES / name).read_bytes()))


def test_a_folder_of_parquet_files_is_one_table(prepare: Prepare, tmp_path: Path) -> None:
    assert captions(prepare(CASES / "dirpq")) == {"a.mp4": "x"}
    folder = tmp_path / "split=train.parquet"
    folder.mkdir()
    assert "this is a folder, and no *.parquet file lies in it" in error_of(folder)
    for number, name in enumerate("ba"):
        pq.write_table(pa.table({"video": [f"{name}.mp4"], "caption": [f"row {number}"]}), folder / f"{name}.parquet")
    assert [row.clip_id for row in Captions(folder).rows(0, 9)] == ["a.mp4", "b.mp4"]
    before = sha256_table(folder)
    pq.write_table(pa.table({"video": ["c.mp4"], "caption": ["?"]}), folder / "c.parquet")
    assert sha256_table(folder) != before
    pq.write_table(pa.table({"video": ["c.mp4"], "text": ["?"]}), folder / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet: its columns are video, text, but those of a.parquet are video, c"):
        Captions(folder)


def test_a_parquet_file_may_have_any_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"video": ["a.mp4"], "caption": ["one"]}), tmp_path / "table")
    assert [row.caption for row in Captions(tmp_path / "table").rows(0, 9)] == ["one"]
    pq.write_table(pa.table({"video": ["a.mp4"], "caption": ["one"]}), tmp_path / "T.PARQUET")
    assert len(Captions(tmp_path / "T.PARQUET")) == 1


def test_words_for_an_empty_cell_are_no_captions(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its 4 rows became a clip: 4 no caption"):
        prepare(CASES / "nan.csv")
    words = [*NOT_A_CAPTION, "NULL", " None ", "N/A", "<NA>"]
    text = "video,caption\n" + "".join(f"{number}.mp4,{word}\n" for number, word in enumerate(words))
    rows = Captions(written(tmp_path / "t.csv", text + "a.mp4,none of them\n")).rows(0, 99)
    assert [row.refused and row.refused[0] for row in rows] == ["no caption"] * len(words) + [None]


def test_numbers_are_no_captions(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 no caption .*the column caption holds numbers \(double\), not text"):
        prepare(CASES / "nancap.parquet")
    for numbers in (pa.array([7]), pa.array([Decimal("7.5")]), pa.array([7.5], pa.float32())):
        pq.write_table(pa.table({"video": ["a.mp4"], "caption": numbers}), tmp_path / "t.parquet")
        (row,) = Captions(tmp_path / "t.parquet").rows(0, 1)
        assert row.refused and row.refused[0] == "no caption" and "numbers" in row.refused[1]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("video", pa.array([1.0, 2.0]), "the column video is double; wanted is one column of text"),
        ("video", pa.array([1, 2]), "the column video is int64"),
        ("caption", pa.array([["a"], ["b"]]), "the column caption is list"),
        ("caption", pa.array([True, False]), "the column caption is bool"),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path: Path, column: str, values: pa.Array, message: str) -> None:
    table = {"video": pa.array(["a.mp4", "b.mp4"]), "caption": pa.array(["one", "two"])} | {column: values}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert message in error_of(tmp_path / "t.parquet")


def test_webvids_ids_may_be_whole_numbers_and_texts_a_dictionary(tmp_path: Path) -> None:
    names = pa.array(["one", None]).dictionary_encode()
    pq.write_table(pa.table({"videoid": pa.array([12, 13]), "name": names}), tmp_path / "t.parquet")
    rows = Captions(tmp_path / "t.parquet").rows(0, 9)
    assert rows[0].files == ["12.mp4"] and rows[1].refused == ["no caption", "the column name is empty"]


def test_a_name_that_is_too_long_is_missing(prepare: Prepare) -> None:
    manifest = prepare(CASES / "longname.csv")
    assert captions(manifest) == {"ok.mp4": "good one", "n24.mp4": "good two"}
    assert list(rejects(manifest).values()) == ["missing"]


@pytest.mark.parametrize("character", [SEPARATOR, NEXT_LINE, "\u2029", "\x0b", "\x1c"])
def test_line_ends_of_unicode_in_a_name_break_no_reader(prepare: Prepare, tmp_path: Path, character: str) -> None:
    if character == SEPARATOR:
        table = CASES / "line_separator.csv"
    else:
        table = written(tmp_path / "t.csv", f"video,caption\nok.mp4,good\nx{character}y.mp4,missing\n")
    manifest = prepare(table)
    assert rejects(manifest) == {f"x{character}y.mp4": "missing"}
    assert ("  missing", "1") in describe(manifest)


def test_a_list_of_corrupt_clips_may_hold_line_ends_of_unicode(tmp_path: Path) -> None:
    clip = CorruptClip(0, 0, 1, "shard", f"x{SEPARATOR}y{NEXT_LINE}", "error", "b", Place(0, 0, 0))
    raw = json.loads(clip.to_json())
    written(tmp_path / CORRUPT, json.dumps(raw, ensure_ascii=False) + "\n")
    assert known_corrupt(tmp_path) == {Place(0, 0, 1): clip}


def test_step_lines_may_hold_line_ends_of_unicode(tmp_path: Path) -> None:
    path = written(tmp_path / "lines.jsonl", f'{{"step": 1, "clip": "x{SEPARATOR}y{NEXT_LINE}"}}\n{{"step": 2}}\n{{"st')
    assert [row["step"] for row in parsed_lines(path, 9)] == [1, 2] and "".join(kept_lines(path, 1)).endswith('"}\n')


def composed(form: str, *names: str) -> list[str]:
    return [unicodedata.normalize(form, name) for name in names]


def test_names_composed_and_decomposed_are_the_same_name(prepare: Prepare, videos: Path, tmp_path: Path) -> None:
    (nfc,), (nfd,) = (composed(form, "café.mp4") for form in ("NFC", "NFD"))
    (videos / "a.mp4").rename(videos / nfd)
    # its caption has a comma and no quotes, which is told, and where
    assert "line 2: 3 columns, but the header has 2, separated by a comma" in error_of(CASES / "nfc.csv")
    name, _, caption = (CASES / "nfc.csv").read_text().splitlines()[1].partition(",")
    assert name == nfc
    manifest = prepare(written(tmp_path / "t.csv", f'video,caption\n{name},"{caption}"\n'))
    assert list(captions(manifest)) == [nfc] and manifest.rejected == 0
    table = RowGroups.of(manifest).read("shard-00000.parquet", 0, ["source"])
    assert json.loads(table["source"][0].as_py())["video"] == nfd


def test_every_mixture_of_composed_and_decomposed_is_found_and_the_exact_one_first(tmp_path: Path) -> None:
    (nfc, folder_nfc), (nfd, folder_nfd) = (composed(form, "é.mp4", "ü") for form in ("NFC", "NFD"))
    (tmp_path / folder_nfd).mkdir()
    written(tmp_path / folder_nfd / nfc, b"")
    for folder in (folder_nfc, folder_nfd):
        for name in (nfc, nfd):
            assert find_video(tmp_path, [f"{folder}/{name}"]) == f"{folder_nfd}/{nfc}"
    written(tmp_path / folder_nfd / nfd, b"")
    assert find_video(tmp_path, [f"{folder_nfd}/{nfd}"]) == f"{folder_nfd}/{nfd}"
    with pytest.raises(NotFound, match=r"missing: no such file in the folder of videos: ö.mp4 or \0.mp4"):
        find_video(tmp_path, ["ö.mp4", "\0.mp4"])


def test_one_video_under_several_spellings_is_there_once(tmp_path: Path) -> None:
    (nfc,), (nfd,) = (composed(form, "é.mp4") for form in ("NFC", "NFD"))
    videos = ["x/../a.mp4", "./a.mp4", " a.mp4", f"{tmp_path}/v/a.mp4", nfc, nfd, "b.mp4"]
    pq.write_table(pa.table({"video": videos, "caption": ["words"] * 7}), tmp_path / "t.parquet")
    rows = Captions(tmp_path / "t.parquet", tmp_path / "v").rows(0, 9)
    assert [row.clip_id for row in rows] == ["a.mp4"] * 4 + [nfc, nfd, "b.mp4"]
    duplicate = ["duplicate", "row 0 has the same video"]
    expected = [None, duplicate, duplicate, duplicate, None, ["duplicate", "row 4 has the same video"], None]
    assert [row.refused for row in rows] == expected


def test_names_with_outer_blanks_are_found_with_and_without_them(tmp_path: Path) -> None:
    for name in (" a.mp4", "b.mp4"):
        written(tmp_path / name, b"")
    pq.write_table(pa.table({"video": [" a.mp4", "b.mp4 "], "caption": ["x", "y"]}), tmp_path / "t.parquet")
    rows = Captions(tmp_path / "t.parquet").rows(0, 9)
    assert [find_video(tmp_path, row.files) for row in rows] == [" a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("https://host/a.mp4", "is a URL; videos are not downloaded"),
        ("s3://bucket/a.mp4", "is a URL"),
        ("file:///videos/a.mp4", "is a URL"),
        ("/etc/passwd", "an absolute path, and not one in the folder of videos"),
        ("/videos-of-others/a.mp4", "an absolute path"),
        ("/videos/../a.mp4", "an absolute path"),
        ("../a.mp4", "leads out of the folder of videos"),
        ("x/../../a.mp4", "leads out of the folder of videos"),
        ("..", "leads out of the folder of videos"),
    ],
)
def test_what_leads_out_of_the_folder_of_videos_is_refused(tmp_path: Path, video: str, message: str) -> None:
    table = written(tmp_path / "t.csv", f"video,caption\n{video},one\n/videos/x/a.mp4,two\n..a.mp4,three\n")
    rows = Captions(table, Path("/videos")).rows(0, 9)
    assert rows[0].refused and rows[0].refused[0] == "not in the folder" and message in rows[0].refused[1]
    assert [(row.clip_id, row.refused) for row in rows[1:]] == [("x/a.mp4", None), ("..a.mp4", None)]
    webvid = written(tmp_path / "w.csv", "videoid,name,page_dir\n../1,one,x\n2,two,../x\n3,three,x\n")
    assert [bool(row.refused) for row in Captions(webvid, Path("/videos")).rows(0, 9)] == [True, True, False]


def test_a_long_table_keeps_every_row_and_every_duplicate(tmp_path: Path) -> None:
    count = 40_000  # more than two portions
    names = [f"{number % 30_000}.mp4" for number in range(count)]
    text = "video,caption\n" + "".join(f"{name},caption {number}\n" for number, name in enumerate(names))
    table = Captions(written(tmp_path / "t.csv", text))
    rows = table.rows(0, count)
    assert [row.number for row in rows] == list(range(count)) and [row.clip_id for row in rows] == names
    refused = [row.refused for row in rows]
    assert refused[:30_000] == [None] * 30_000
    assert refused[30_000:] == [["duplicate", f"row {number} has the same video"] for number in range(10_000)]


def test_only_the_columns_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"video": ["a.mp4"], "caption": ["x"], "vector": [[1.0] * 9]}), tmp_path / "t.parquet")
    asked, read = [], pq.ParquetFile.read

    def watched(self: pq.ParquetFile, columns: list[str]) -> pa.Table:
        asked.append(columns)
        return read(self, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read", watched)
    Captions(tmp_path / "t.parquet")
    assert asked == [["video", "caption"]]
