"""Sources that the real writers of the field have written: datasets, webdataset, img2dataset, polars, duckdb."""

import functools
import http.server
import json
import os
import subprocess
import threading
from pathlib import Path

import pytest

from pixart.data.sources.open import open_source
from tests.pixart.data.sources.test_sources import noise_image, write

IMAGES = [noise_image(index, side=300) for index in range(4)]
CAPTIONS = [f"caption {index}, été" for index in range(4)]
# img2dataset needs older versions of packages of the suite: it is run in an environment of its own.
IMG2DATASET = Path(os.environ.get("IMG2DATASET", Path(__file__).parents[4] / ".venv-img2dataset/bin/img2dataset"))


def rows(url):
    source = open_source(f"{url}")
    return [(item.data, item.label, item.text) for item in source.read(0, len(source))]


@pytest.fixture(scope="module")
def dataset():
    """Dataset of four images, as `datasets` holds it."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
        }
    )
    columns = {"image": [{"bytes": data, "path": None} for data in IMAGES], "label": [0, 1, 1, 0], "text": CAPTIONS}
    return datasets.Dataset.from_dict(columns, features)


def test_parquet_of_datasets(dataset, tmp_path):
    dataset.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert rows(tmp_path) == list(zip(IMAGES, [0, 1, 1, 0], CAPTIONS, strict=True))
    assert open_source(f"{tmp_path}").class_names == ["cat", "dog"]


def test_tar_of_datasets(dataset, tmp_path):
    """The tar that a loop over a dataset writes with webdataset, fields named after the columns."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(f"{tmp_path}/0.tar") as writer:
        for index, row in enumerate(dataset.cast_column("image", __import__("datasets").Image(decode=False))):
            fields = {"image.jpg": row["image"]["bytes"], "label.cls": row["label"], "text.txt": row["text"]}
            writer.write({"__key__": str(index), **fields})
    assert rows(tmp_path) == list(zip(IMAGES, [0, 1, 1, 0], CAPTIONS, strict=True))


@pytest.mark.parametrize("fields", [("txt", "cls"), ("json",)])
def test_shards_of_webdataset(tmp_path, fields):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/%05d.tar", maxcount=3, verbose=0) as writer:
        for index in range(4):
            values = {"txt": CAPTIONS[index], "cls": index, "json": {"caption": CAPTIONS[index], "label": index}}
            writer.write({"__key__": f"{index:06d}", "jpg": IMAGES[index], **{name: values[name] for name in fields}})
    assert rows(tmp_path) == list(zip(IMAGES, range(4), CAPTIONS, strict=True))


def test_parquet_of_polars(tmp_path):
    polars = pytest.importorskip("polars")
    columns = {"image": IMAGES, "caption": CAPTIONS, "label": [3, 2, 1, 0]}
    frame = polars.DataFrame(columns).with_columns(polars.col("caption").cast(polars.Categorical))
    frame.write_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path) == list(zip(IMAGES, [3, 2, 1, 0], CAPTIONS, strict=True))


def test_parquet_of_duckdb_with_partitions(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect()
    connection.execute("CREATE TABLE t (image BLOB, text VARCHAR, label INTEGER)")
    connection.executemany("INSERT INTO t VALUES (?, ?, ?)", list(zip(IMAGES, CAPTIONS, [1, 0, 1, 0], strict=True)))
    connection.execute(f"COPY t TO '{tmp_path}/flat.parquet' (FORMAT parquet, COMPRESSION zstd)")
    assert rows(tmp_path / "flat.parquet") == list(zip(IMAGES, [1, 0, 1, 0], CAPTIONS, strict=True))
    connection.execute(f"COPY t TO '{tmp_path}/hive' (FORMAT parquet, PARTITION_BY (label))")
    expected = [(IMAGES[row], row % 2 == 0, CAPTIONS[row]) for row in (1, 3, 0, 2)]
    assert sorted(rows(tmp_path / "hive")) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["files", "webdataset", "parquet"])
def test_img2dataset(tmp_path, output):
    if not IMG2DATASET.exists():
        pytest.skip(f"no img2dataset at {IMG2DATASET}: run `make img2dataset-env`")
    for index, data in enumerate(IMAGES):
        write(f"{tmp_path}/web/{index}.jpg", data)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = [f"http://127.0.0.1:{server.server_port}/{index}.jpg" for index in (0, 1, 9, 2, 3)]  # one is missing
        lines = [{"url": url, "caption": f"caption {url[-5]}"} for url in urls]
        (tmp_path / "urls.json").write_text(json.dumps(lines))
        options = {
            "url_list": tmp_path / "urls.json",
            "input_format": "json",
            "url_col": "url",
            "caption_col": "caption",
            "output_format": output,
            "output_folder": tmp_path / "images",
            "resize_mode": "no",
            "processes_count": 1,
            "thread_count": 2,
            "number_sample_per_shard": 3,
            "enable_wandb": False,
            "disable_all_reencoding": True,
            "disallowed_header_directives": "[]",
        }
        command = [IMG2DATASET, *(f"--{name}={value}" for name, value in options.items())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.shutdown()
        server.server_close()
    texts = {data: text for data, _, text in rows(tmp_path / "images") if data}
    assert texts == {data: f"caption {index}" for index, data in enumerate(IMAGES)}
    assert open_source(f"{tmp_path}/images").class_names == []
