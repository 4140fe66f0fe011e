"""The browser of captions: its queries, its HTTP application on the demo's data, and its page in Chromium."""

import socket
import threading
import time
from pathlib import Path

import duckdb
import pytest
import uvicorn
from fastapi.testclient import TestClient

from jobs.reports.browser.app import make_app
from jobs.reports.browser.query import PAGE_SIZE, Captions, Search
from pixart.data import manifest as manifests
from tests.support.accessibility import check_accessible, check_narrow

ROWS_PER_SHARD = 100_000
MAX_SEARCH_SECONDS = 1.0  # of processor time, for a search of a million captions
PART = """COPY (
  SELECT 'image-' || i AS id, (i % 100)::INT AS label, i % 50 <> 0 AS valid,
    CASE WHEN i % 1000 = 1 THEN ' ' ELSE 'A photograph of a ' || (['red', 'blue', 'golden'])[1 + i % 3] || ' '
      || (['cat', 'Dog', 'house', 'boat'])[1 + (i // 3) % 4] || ' number ' || i || ' beside a long wooden table in the '
      || 'evening light, with several people walking past' || repeat(' again', (i % 7)::INT) END AS caption,
    'short' AS short_caption, CASE WHEN i % 50 = 0 THEN 'blurred' ELSE '' END AS reason, '' AS detail,
    NULL::BLOB AS thumbnail, 512::INT AS width, 512::INT AS height, (i % 1000 / 1000.0)::FLOAT AS brightness,
    5.0::FLOAT AS entropy
  FROM range({begin}, {end}) AS t(i)
) TO '{file}' (FORMAT parquet)"""


def write_parts(dataset: Path, rows: int) -> None:
    (dataset / "captions").mkdir(parents=True)
    for begin in range(0, rows, ROWS_PER_SHARD):
        file = dataset / f"captions/{begin // ROWS_PER_SHARD:05d}.parquet"
        duckdb.execute(PART.format(begin=begin, end=min(rows, begin + ROWS_PER_SHARD), file=file))


def test_searches_and_filters(tmp_path):
    write_parts(tmp_path, 3000)
    captions = Captions(tmp_path, ROWS_PER_SHARD)
    count, rows = captions.find(Search(words="DOG golden"))
    expected = [i for i in range(3000) if i % 3 == 2 and (i // 3) % 4 == 1 and i % 1000 != 1]
    assert (count, [row["row"] for row in rows]) == (len(expected), expected[:PAGE_SIZE])
    assert "golden Dog number 5 " in rows[0]["caption"]
    assert [row["row"] for row in captions.find(Search(words="dog golden", page=1))[1]] == expected[48:96]
    assert captions.find(Search(words="%"))[0] == 0
    assert captions.find(Search(state="empty"))[0] == 3
    assert captions.find(Search(reason="blurred", label=50))[0] == 30
    assert captions.find(Search(limits={"brightness": (0.2, 0.3)}))[0] == pytest.approx(303, abs=4)
    longest, shortest = (captions.find(Search(order=order, state="valid"))[1][0] for order in ("-words", "words"))
    assert (longest["words"], shortest["words"]) == (28, 0)
    assert captions.find(Search(order="alike")) == (0, [])
    summary = captions.summary()
    assert (summary["rows"], summary["valid"], summary["empty"]) == (3000, 2940, 3)
    for bad in (Search(order="caption; DROP TABLE captions"), Search(state="x")):
        with pytest.raises(ValueError, match="must be"):
            captions.find(bad)
    with pytest.raises(ValueError, match="has no captions yet"):
        Captions(tmp_path / "none", 1)


@pytest.mark.slow
def test_a_million_captions_are_searched_in_a_second(tmp_path):
    """Processor time of all threads, which is at least the time on two free cores."""
    write_parts(tmp_path, 1_000_000)
    captions = Captions(tmp_path, ROWS_PER_SHARD)
    searches = [
        Search(words="golden boat"),
        Search(words="nowhere"),
        Search(words="number 777777"),
        Search(order="-words"),
        Search(words="cat", limits={"words": (21, None), "brightness": (None, 0.5)}, order="brightness"),
        Search(words="cat", page=500),
    ]
    for search in searches:
        begun = time.process_time()
        count, rows = captions.find(search)
        seconds = time.process_time() - begun
        print(f"{seconds:.2f} s: {count} rows for {search}")
        assert seconds < MAX_SEARCH_SECONDS
        assert bool(rows) == (search.words != "nowhere")


@pytest.fixture(scope="module")
def browsed(small_demo):
    """Application for the dataset of the demo."""
    return make_app(manifests.read(small_demo.home / "datasets/demo"))


@pytest.mark.slow
def test_the_application_serves_this_machine_alone(browsed):
    client = TestClient(browsed, base_url="http://127.0.0.1")
    answer = client.get("/captions", params={"words": "red", "order": "-words"}).json()
    assert answer["count"] > 0
    assert all("red" in row["caption"] for row in answer["rows"])
    image = client.get(f"/image/{answer['rows'][0]['row']}")
    assert (image.headers["content-type"], image.content[:2]) == ("image/jpeg", b"\xff\xd8")
    assert client.get("/image/999999").status_code == 404
    assert client.get("/captions", params={"words_min": "many"}).json() == {
        "error": "words_min 'many': must be a number"
    }
    assert "Dataset audit" in client.get("/audit").text
    assert client.get("/", headers={"host": "attacker.example"}).status_code == 400
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]


def wait_for(page, expression: str) -> None:
    """Wait until an expression is true; Playwright's own wait evaluates in the page, whose policy forbids that."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_finds_captions(browsed, open_page, scheme):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(browsed, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with open_page(f"http://127.0.0.1:{listener.getsockname()[1]}/", scheme, "browser") as page:
            page.wait_for_selector("#rows figure")
            assert "64 rows" in page.inner_text("#summary")
            page.fill("input[name=words]", "red")
            with page.expect_response("**/captions?*words=red*"):
                page.press("input[name=words]", "Enter")
            wait_for(page, "[...document.querySelectorAll('#rows p:first-child')].every(p => /red/.test(p.innerText))")
            wait_for(page, "[...document.images].slice(0, 2).every(i => i.complete && i.naturalWidth >= 64)")
            check_accessible(page)
            check_narrow(page)
    finally:
        server.should_exit = True
        thread.join()
