"""The README and docs say what the stored results, the ledger and the notebooks say."""

import re
import subprocess
import sys
import tomllib

import pytest

from benchmarks import pages
from benchmarks.pages import PAGES, ROOT, PageError, fill
from qlora_edu import cli

WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NAMES = [path.name for path in WRITTEN]


def text_of(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_page_holds_what_the_script_makes(path):
    text = text_of(path)
    assert fill(text, path.name) == text, "run make pages"


def test_every_table_stands_on_some_page():
    begun = {name for path in PAGES for name in re.findall(r"<!-- (\S+): begin -->", text_of(path))}
    assert begun == pages.BLOCKS.keys()


def spoil_a_run(found):
    of_qlora = [r for r in found["runs"] if (r["part"], r["way"]) == ("seeds", "qlora")]
    of_qlora[0].update(exact_match=0.5)


@pytest.mark.parametrize(
    ("block", "name", "change"),
    [
        ("study", "three_ways", spoil_a_run),
        ("verdicts", "three_ways", spoil_a_run),
        ("base", "embedded_comparison", lambda found: found["base"].update({"0_shot": 0.5})),
        ("bench", "bench", lambda found: found["rows"][0].update(ratio=0.5)),
        ("planner", "memory", lambda found: found["rows"][3].update(error=-0.3)),
        ("paging", "paging", lambda found: [row.update(ratio=9.9) for row in found["rows"]]),
        ("gpu", "gpu_headline", lambda found: found["rows"][1].update(peak_bytes=10**9)),
        ("gpu-steps", "gpu_steps", lambda found: found["rows"][0].update(seconds_a_step=9.0)),
        (
            "gpu-bytes",
            "gpu_quantiser",
            lambda found: found["rows"][0]["packed"].update(differing=77),
        ),
        ("gpu-paging", "gpu_paging", lambda found: found["rows"][0].update(seconds_a_step=9.0)),
        ("headline", "memory", lambda found: found["rows"][3].update(error=-0.3)),
        ("headline", "gpu_headline", lambda found: found["rows"][1].update(peak_bytes=10**9)),
    ],
)
def test_a_result_measured_anew_changes_its_table(block, name, change, monkeypatch):
    before, read = pages.BLOCKS[block](), pages.stored

    def changed(asked):
        found = read(asked)
        if asked == name:
            change(found)
        return found

    monkeypatch.setattr(pages, "stored", changed)
    assert pages.BLOCKS[block]() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- base: begin -->", "the block 'base' has no end"),
        ("<!-- base: end -->", "'base: end' begins or ends no block"),
        ("<!-- base: begin --><!-- bench: end -->", "'bench: end' begins or ends no block"),
        ("<!-- the-moon: begin -->", "'the-moon: begin' begins or ends no block"),
    ],
)
def test_a_page_that_cannot_be_filled_is_refused_and_left_alone(text, message, tmp_path):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("<!-- base: begin -->\nold\n<!-- base: end -->\n", encoding="utf-8")
    bad.write_text(text, encoding="utf-8")
    with pytest.raises(PageError, match=rf"bad\.md: .*{message}"):
        pages.main([good, bad])
    assert text_of(bad) == text and "old" in text_of(good)
    pages.main([good])
    made = f"<!-- base: begin -->\n{pages.base()}\n<!-- base: end -->\n"
    assert text_of(good) == made


@pytest.mark.parametrize("time", ["", "a while", "some hours: 75 minutes"])
def test_a_time_that_cannot_be_read_is_refused(time):
    with pytest.raises(PageError, match=r"write ('75 minutes|digits)"):
        pages.minutes(time)


@pytest.mark.parametrize("path", WRITTEN, ids=NAMES)
def test_every_link_leads_to_a_file(path):
    links = re.findall(r"\]\(([^)#]+)\)", text_of(path))
    for link in links:
        assert "://" not in link and (path.parent / link).exists(), link


@pytest.mark.parametrize("path", WRITTEN, ids=NAMES)
def test_every_command_that_is_named_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    text = text_of(path)
    if path.name != "CHANGELOG.md":  # that one names what is gone, too
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
        assert named <= targets, named - targets
    assert set(re.findall(r"python -m qlora_edu (\w+)", text)) <= cli.COMMANDS.keys()
    stored = text.partition("<!-- sources: begin -->")[0]
    for script in re.findall(r"`python ([a-z/_]+\.py)", stored):
        assert (ROOT / script).is_file(), script


@pytest.mark.slow
def test_the_plans_printed_beside_the_card_say_what_is_printed():
    for (theirs, _), command in zip(
        pages.sizes(), [pages.plan_command(row) for row, _ in pages.sizes()], strict=True
    ):
        assert command in text_of(ROOT / "docs" / "measured.md")
        words = [sys.executable, *command.split()[1:]]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert f"peak: {theirs['plan_bytes'] / 2**30:.3f} GiB" in done.stdout, done.stderr


def test_the_citation_names_the_version_and_the_licence():
    import yaml

    cited = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["title"] and cited["message"] and cited["authors"]
    assert f"## [{project['version']}]" in text_of(ROOT / "CHANGELOG.md")
