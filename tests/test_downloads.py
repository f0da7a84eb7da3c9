import hashlib
import shutil
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rba_core import cli, downloads
from rba_core.downloads import DOWNLOADS, Download, download
from rba_core.errors import InputError

BYTES = bytes(range(256)) * 40_000


@pytest.fixture
def server():
    """Serves BYTES at any path; what it does is to be changed: `ranges`, `cut`, `status`, `content`. It tells what was asked for."""
    state = SimpleNamespace(ranges=True, cut=None, status=None, content=BYTES, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            if state.status:
                return self.send_error(state.status)
            start = int(wanted[len("bytes=") : -1]) if wanted and state.ranges else 0
            body = state.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if state.cut is None else body[: state.cut])

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    state.pin = Download(f"http://127.0.0.1:{served.server_port}/weights.safetensors", len(BYTES), hashlib.sha256(BYTES).hexdigest(), "weights.safetensors")
    yield state
    served.shutdown()
    served.server_close()


def test_whole(server, tmp_path):
    told = []
    path = download(server.pin, tmp_path / "models" / "checkpoints", lambda done, total: told.append((done, total)))
    assert path == tmp_path / "models" / "checkpoints" / "weights.safetensors" and path.read_bytes() == BYTES
    assert [*path.parent.iterdir()] == [path] and server.asked == [None]
    assert told[-1] == (len(BYTES), len(BYTES)) and len(told) > 5 and sorted(told) == told


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    path = download(server.pin, tmp_path)
    server.status = 500
    assert download(server.pin, tmp_path) == path and len(server.asked) == 1


def test_another_file_of_that_name_is_left_alone(server, tmp_path):
    (tmp_path / server.pin.file).write_text("mine")
    with pytest.raises(InputError, match="file: .* is there, and is another"):
        download(server.pin, tmp_path)
    assert (tmp_path / server.pin.file).read_text() == "mine" and not server.asked


def test_goes_on_after_a_cut(server, tmp_path):
    server.cut = 3_000_000
    with pytest.raises(InputError, match="network: the connection ended after 3,000,000 of 10,240,000 bytes; what arrived is kept"):
        download(server.pin, tmp_path)
    assert not (tmp_path / server.pin.file).exists()
    server.cut = None
    assert download(server.pin, tmp_path).read_bytes() == BYTES
    assert server.asked == [None, "bytes=3000000-"] and len([*tmp_path.iterdir()]) == 1


def test_begins_again_where_no_parts_are_sent(server, tmp_path):
    server.cut, server.ranges = 3_000_000, False
    with pytest.raises(InputError, match="connection ended"):
        download(server.pin, tmp_path)
    server.cut = None
    assert download(server.pin, tmp_path).read_bytes() == BYTES


def test_cancelled_and_gone_on_from(server, tmp_path):
    def cancel(done: int, total: int) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.pin, tmp_path, cancel)
    assert not (tmp_path / server.pin.file).exists()
    assert download(server.pin, tmp_path).read_bytes() == BYTES and server.asked[1].startswith("bytes=")


@pytest.mark.parametrize("content", [BYTES[:-1] + b"!", BYTES + b"more"], ids=["other bytes", "too many"])
def test_other_bytes_are_not_kept(server, tmp_path, content):
    server.content = content
    with pytest.raises(InputError, match="sha256: of what .* is not"):
        download(server.pin, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_network_away(server, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        away = replace(server.pin, url=f"http://127.0.0.1:{free.getsockname()[1]}/weights.safetensors")
        with pytest.raises(InputError, match=r"network: 127.0.0.1:\d+ cannot be reached .*refused.* elsewhere and put it here as weights.safetensors"):
            download(away, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_server_without_the_file(server, tmp_path):
    server.status = 404
    with pytest.raises(InputError, match="url: .*weights.safetensors answers 404 Not Found"):
        download(server.pin, tmp_path)


def test_no_room(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="folder: .* has room for 0.00 GB, 0.01 GB are needed"):
        download(server.pin, tmp_path)
    assert not server.asked


@pytest.mark.parametrize(
    "change, problem",
    [({"url": "file:///etc/passwd"}, "url: is"), ({"sha256": "abc"}, "sha256: is"), ({"size": 0}, "size: is 0"), ({"file": "../x"}, "file: is"), ({"file": ""}, "file: is")],
)
def test_what_is_no_pin(change, problem):
    with pytest.raises(InputError, match=problem):
        replace(DOWNLOADS["sd15"], **change)


def test_every_shipped_pin_names_a_revision():
    for pin in DOWNLOADS.values():
        revision = pin.url.split("/resolve/")[1].split("/")[0]
        assert pin.url.startswith("https://") and len(revision) == 40 and int(revision, 16) and pin.licence and pin.what
    assert len({(pin.folder, pin.file) for pin in DOWNLOADS.values()}) == len(DOWNLOADS)


def test_the_command(server, tmp_path, capsys, monkeypatch):
    assert cli.main(["download"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out and pin.sha256 in out and f"{pin.size:,} bytes" in out for name, pin in DOWNLOADS.items())
    given = ["download", "--url", server.pin.url, "--sha256", server.pin.sha256.upper(), "--size", str(server.pin.size)]
    assert cli.main([*given, "--to", str(tmp_path)]) == 0
    assert (tmp_path / "weights.safetensors").read_bytes() == BYTES and str(tmp_path / "weights.safetensors") in capsys.readouterr().out
    monkeypatch.setitem(DOWNLOADS, "small", replace(server.pin, folder="checkpoints"))
    monkeypatch.setattr(downloads, "models_folder", lambda: tmp_path)
    assert cli.main(["download", "small"]) == 0 and (tmp_path / "checkpoints" / "weights.safetensors").read_bytes() == BYTES


def test_the_command_refuses(capsys, monkeypatch):
    monkeypatch.setattr(downloads, "models_folder", lambda: None)
    for given, problem in ((["sd16"], "name: 'sd16' is not known"), (["--url", "https://x/y"], "url: stands alone"), (["sd15"], "to: is missing")):
        assert cli.main(["download", *given]) == 2 and f"rba: {problem}" in capsys.readouterr().err


def test_the_folder_of_models_is_found(tmp_path, monkeypatch):
    assert downloads.models_folder() is None
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(downloads, "__file__", str(tmp_path / "custom_nodes" / "refine-by-align" / "rba_core" / "downloads.py"))
    assert downloads.models_folder() == tmp_path / "models"
