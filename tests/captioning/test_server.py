"""The captioner behind an OpenAI-compatible server, against a server on this machine that does as it is told."""

import base64
import email.utils
import io
import json
import logging
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from captioners import caption_folder
from PIL import Image

from lora_workbench.captioning.captioner import CaptioningStopped, summary
from lora_workbench.captioning.server import LONGEST_WAIT, TRIES, ServerCaptioner
from lora_workbench.captioning.server_address import OWN_KEY_PREFIX, parse_address, read_key

KEY = "sk-test-1234567890abcdef"
VARIABLE = "CAPTION_TEST_KEY"


class Stub:
    """An address to ask, what was asked there, and what will be replied: the last reply is given for ever."""

    def __init__(self, address: str):
        self.address, self.asked, self.replies = address, [], []

    def reply(self, status: int = 200, body: object = None, headers: dict | None = None, delay: float = 0.0):
        self.replies.append((status, body, headers or {}, delay))


def said(text: object, **message) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}]}


@contextmanager
def serving():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.asked.append((self.path, dict(self.headers), body))
            status, answer, headers, delay = stub.replies.pop(0) if len(stub.replies) > 1 else stub.replies[0]
            time.sleep(delay)
            sent = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": len(sent), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            """A client that gave up waiting is no error here."""

    server = Server(("127.0.0.1", 0), Handler)
    stub = Stub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def stub():
    with serving() as stub:
        yield stub


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv(VARIABLE, KEY)
    return KEY


def captioner(stub, key_variable="", timeout=5.0, waits=None):
    """One that notes how long it would have waited, and does not wait."""
    return ServerCaptioner(
        stub.address, "toy-vl", key_variable, timeout, wait=waits.append if waits is not None else lambda _: None
    )


def ask(writer, size=(40, 30)):
    return writer.caption([Image.new("RGB", size, "red")], "Describe it.")[0]


# What is sent


def test_the_picture_and_the_instruction_are_sent(stub):
    stub.reply(body=said(" A red field. "))
    assert ask(captioner(stub)).text == "A red field."
    path, headers, body = stub.asked[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body["model"] == "toy-vl" and body["temperature"] == 0
    (message,) = body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert message["content"][1]["text"] == "Describe it."
    kind, _, data = message["content"][0]["image_url"]["url"].partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg" and picture.size == (40, 30)
    assert all(abs(a - b) < 4 for a, b in zip(picture.convert("RGB").getpixel((5, 5)), (255, 0, 0), strict=True))


def test_large_pictures_are_shrunk_before_they_leave(stub):
    stub.reply(body=said("large"))
    ask(captioner(stub), size=(3000, 1500))
    data = stub.asked[0][2]["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1024, 512)


def test_an_answer_in_parts_is_put_together(stub):
    stub.reply(body=said([{"type": "text", "text": "A fox."}, {"type": "other"}, {"type": "text", "text": "Snow."}]))
    assert ask(captioner(stub)).text == "A fox. Snow."


def test_settings_that_a_model_does_not_take_are_left_out(stub):
    stub.reply(400, {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model."}})
    stub.reply(400, {"error": {"message": "'temperature' does not support 0 with this model."}})
    stub.reply(body=said("A fox."))
    writer = captioner(stub)
    assert ask(writer).text == ask(writer).text == "A fox."
    assert [{"temperature", "max_tokens"} & set(body) for *_, body in stub.asked] == [
        {"temperature", "max_tokens"},
        {"temperature"},
        set(),
        set(),
    ]


# Trouble


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_passing_trouble_is_waited_out(stub, status):
    stub.reply(status, {"error": {"message": "busy"}})
    stub.reply(body=said("A fox."))
    waits = []
    assert ask(captioner(stub, waits=waits)).text == "A fox."
    assert waits == [1.0]


@pytest.mark.parametrize(
    "header, expected",
    [("7", 7), ("0", 0), ("3600", LONGEST_WAIT), ("-5", 0), ("soon", 1), ("date", 20), ("old date", 0)],
)
def test_retry_after_is_obeyed_up_to_a_minute(stub, header, expected):
    dates = {"date": time.time() + 20.5, "old date": time.time() - 500}
    header = email.utils.formatdate(dates[header], usegmt=True) if header in dates else header
    stub.reply(429, b"slow down", {"Retry-After": header})
    stub.reply(body=said("A fox."))
    waits = []
    assert ask(captioner(stub, waits=waits)).text == "A fox."
    assert waits == [pytest.approx(expected, abs=1.5 if expected == 20 else 0)]


def test_lasting_trouble_is_the_error_of_that_picture_and_then_ends_the_run(stub):
    stub.reply(503, {"error": {"message": "no capacity"}})
    waits = []
    writer = captioner(stub, waits=waits)
    for _ in range(2):
        assert ask(writer).error == (f"the server 127.0.0.1 gave no answer in {TRIES} tries: HTTP 503 (no capacity)")
    with pytest.raises(CaptioningStopped, match="for 3 pictures in a row"):
        ask(writer)
    assert waits[: TRIES - 1] == [1.0, 2.0, 4.0, 8.0] and len(stub.asked) == 3 * TRIES


def test_one_answer_makes_up_for_earlier_trouble(stub):
    for _ in range(2 * TRIES):
        stub.reply(500, b"crashed")
    stub.reply(body=said("A fox."))
    for _ in range(2 * TRIES):
        stub.reply(500, b"crashed")
    writer = captioner(stub)
    outcomes = [bool(ask(writer).text) for _ in range(5)]
    assert outcomes == [False, False, True, False, False]


@pytest.mark.parametrize("status, why", [(401, "the key"), (403, "does not allow"), (404, "no such model")])
def test_a_refusal_that_holds_for_every_picture_ends_the_run(stub, status, why):
    stub.reply(status, {"error": {"message": "no"}})
    with pytest.raises(CaptioningStopped, match=rf"127\.0\.0\.1 refused: .*{why}.*HTTP {status} \(no\)"):
        ask(captioner(stub))
    assert len(stub.asked) == 1


def test_a_picture_that_the_server_refuses_does_not_stop_the_others(stub):
    stub.reply(400, {"error": {"message": "image violates the policy"}})
    stub.reply(body=said("A fox."))
    writer = captioner(stub)
    assert ask(writer).error == "the server refused this picture: HTTP 400 (image violates the policy)"
    assert ask(writer).text == "A fox."


def test_a_server_that_does_not_answer_in_time_is_named(stub):
    stub.reply(body=said("late"), delay=1.0)
    assert "it cannot be reached (no answer in time)" in ask(captioner(stub, timeout=0.05)).error


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    writer = ServerCaptioner(address, "toy-vl", wait=lambda _: None)
    assert re.search(r"cannot be reached \(.*refused", ask(writer).error, re.IGNORECASE)


@pytest.mark.parametrize(
    "body, error",
    [
        (said(""), "the model's answer is empty"),
        (said(None), "the model's answer is empty"),
        (said(None, refusal="I will not."), "the model refused: I will not."),
        (
            {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
            "the model refused: its filter",
        ),
        ({"choices": []}, "the server's reply holds no answer"),
        ({"error": {"message": "overloaded"}}, r"the server's reply holds no answer \(overloaded\)"),
        ([1, 2], "the server's reply holds no answer"),
        (b"<html>hello</html>", "the server's reply is not JSON: <html>hello"),
    ],
)
def test_empty_and_refused_answers_are_errors_of_that_picture(stub, body, error):
    stub.reply(body=body)
    answer = ask(captioner(stub))
    assert answer.text == "" and re.match(error, answer.error)


def test_captions_made_before_a_failure_are_kept_and_a_second_run_makes_the_rest(stub, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    stub.reply(body=said("A fox."))
    stub.reply(400, {"error": {"message": "no"}})
    stub.reply(body=said("A hare."))
    stub.reply(401, {"error": {"message": "expired"}})
    reports = []
    with pytest.raises(CaptioningStopped, match="expired"):
        for report in caption_folder(paths, captioner(stub)):
            reports.append(report)  # noqa: PERF402
    assert [path.with_suffix(".txt").exists() for path in paths] == [True, False, True, False]
    stub.replies[:] = []
    stub.reply(body=said("An owl."))
    again = summary(caption_folder(paths, captioner(stub)))
    assert again.startswith("2 written") and "0 failed" in again
    assert [path.with_suffix(".txt").read_text().strip() for path in paths] == [
        "A fox.",
        "An owl.",
        "A hare.",
        "An owl.",
    ]


def test_waiting_can_be_cancelled(stub):
    class Cancelled(BaseException):
        pass

    def wait(seconds):
        raise Cancelled

    stub.reply(503)
    with pytest.raises(Cancelled):
        ask(ServerCaptioner(stub.address, "toy-vl", wait=wait))


# The key


def test_the_key_comes_from_the_environment_and_goes_into_the_header_alone(stub, key):
    stub.reply(body=said("A fox."))
    ask(captioner(stub, VARIABLE))
    path, headers, body = stub.asked[0]
    assert headers["Authorization"] == f"Bearer {key}"
    assert key not in path and key not in json.dumps(body)


def test_the_key_is_in_no_message(stub, key, caplog):
    caplog.set_level(logging.DEBUG)
    echo = {"error": {"message": f"{'x' * 150} {key} is wrong"}}
    for status in (400, 503, 401, 200):
        stub.replies[:] = []
        stub.reply(status, echo)
        writer = captioner(stub, VARIABLE)
        try:
            heard = ask(writer).error
        except CaptioningStopped as error:
            heard = str(error)
        assert heard and key not in heard and key[:8] not in heard
        assert key not in repr(writer)
    assert key[:8] not in caplog.text


def test_a_redirect_is_not_followed(stub, key):
    with serving() as other:
        other.reply(body=said("stolen"))
        for status in (301, 302, 303, 307, 308):
            stub.replies[:] = []
            stub.reply(status, b"", {"Location": f"{other.address}/v1/chat/completions"})
            with pytest.raises(CaptioningStopped, match="sends on to another address, which is not followed"):
                ask(captioner(stub, VARIABLE))
        assert other.asked == []


@pytest.mark.parametrize("typed", [KEY, "sk_live_ABCdef0123456789", "SECRETKEY0123456789"])
def test_a_key_typed_in_place_of_the_name_is_refused_and_not_repeated(typed):
    with pytest.raises(ValueError) as refused:
        ServerCaptioner("https://api.openai.com/v1", "gpt", typed)
    assert typed not in str(refused.value)


def test_a_key_that_is_not_set_is_named_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="no key in the environment variable OPENAI_API_KEY: set it before ComfyUI"):
        ServerCaptioner("https://api.openai.com/v1", "gpt", "OPENAI_API_KEY")


@pytest.mark.parametrize("value", ["sk-1\nInjected: yes", "sk-schl\u00fcssel"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(value):
    address = parse_address("https://api.openai.com")
    with pytest.raises(ValueError, match="cannot be a key") as refused:
        read_key(address, "OPENAI_API_KEY", {"OPENAI_API_KEY": value})
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize(
    "address, variable",
    [
        ("https://evil.example/v1", "OPENAI_API_KEY"),
        ("https://evil.example/v1", "AWS_SECRET_ACCESS_KEY"),
        ("https://api.openai.com.evil.example/v1", "OPENAI_API_KEY"),
        ("https://api.openai.com/v1", "HF_TOKEN"),
        ("http://192.168.1.5:1234/v1", "HF_TOKEN"),
    ],
)
def test_a_workflow_cannot_send_a_secret_to_a_host_it_does_not_belong_to(address, variable):
    with pytest.raises(ValueError, match=f"may not be given .* starts with {OWN_KEY_PREFIX}"):
        read_key(parse_address(address), variable, {variable: KEY})


def test_a_key_made_for_captioning_goes_to_any_encrypted_or_local_server():
    for address in ("https://captions.example", "http://192.168.1.5:1234", "http://localhost:11434"):
        assert read_key(parse_address(address), "CAPTION_API_KEY", {"CAPTION_API_KEY": f" {KEY}\n"}) == KEY
    with pytest.raises(ValueError, match="unencrypted: use an address that starts with https"):
        read_key(parse_address("http://captions.example"), "CAPTION_API_KEY", {"CAPTION_API_KEY": KEY})


@pytest.mark.parametrize("host", ["134744072", "0x08080808", "[::ffff:8.8.8.8]"])
def test_a_number_that_stands_for_a_far_host_does_not_pass_for_a_name_in_the_local_network(host):
    address = parse_address(f"http://{host}/v1")
    assert "leave this machine" in address.notice
    with pytest.raises(ValueError, match="unencrypted"):
        read_key(address, "CAPTION_API_KEY", {"CAPTION_API_KEY": KEY})


# The address


@pytest.mark.parametrize(
    "typed, url",
    [
        ("http://localhost:11434", "http://localhost:11434/v1"),
        (" http://localhost:1234/v1/ ", "http://localhost:1234/v1"),
        ("https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1"),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai",
        ),
        ("http://[::1]:8080", "http://[::1]:8080/v1"),
    ],
)
def test_addresses_are_understood_as_people_write_them(typed, url):
    assert parse_address(typed).url == url


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "localhost:11434",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "http://h:x",
        "http://a b/v1",
        "http://evil\u3002example/v1",
    ],
)
def test_what_is_no_address_is_refused(typed):
    with pytest.raises(ValueError, match="is not a server address"):
        parse_address(typed)


@pytest.mark.parametrize("typed", ["https://me:secret@host/v1", "https://host/v1?key=secret"])
def test_secrets_in_an_address_are_refused_and_not_repeated(typed):
    with pytest.raises(ValueError, match="would be saved in the workflow") as refused:
        parse_address(typed)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "192.168.0.4", "10.1.2.3", "workstation", "gpu.local", "[fd00::1]"]
)
def test_pictures_that_stay_in_the_local_network_need_no_notice(host):
    assert parse_address(f"http://{host}:1234").notice == ""


@pytest.mark.parametrize("host", ["api.openai.com", "8.8.8.8", "0.0.0.0", "localhost.example.com", "127.0.0.1.nip.io"])
def test_it_says_that_pictures_leave_the_machine_before_the_first_one_does(host, caplog, monkeypatch):
    writer = ServerCaptioner(f"https://{host}/v1", "gpt", wait=lambda _: None)
    assert writer.notice == f"The pictures leave this machine: each one is sent to {host}."
    heard = []
    monkeypatch.setattr(writer, "_reply", lambda message: heard.append(list(caplog.messages)) or said("A fox."))
    for _ in range(2):
        ask(writer)
    assert heard == [[writer.notice]] * 2  # said once, before the first
