"""A small server with the part of vLLM's HTTP interface that the sampler uses: real sockets, a real model, and faults.

It samples with the cache sampler from a model of its own, which changes only when `reload_weights` names a folder.
"""

import contextlib
import copy
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file

from fastgrpo.trainer.sampling.sampler import KVSampler


class FakeVLLM:
    """Serves on a free port of this machine until `close`."""

    def __init__(self, model, *, dev_mode=True, processed=True):
        self.model = copy.deepcopy(model)
        self.dev_mode, self.processed = dev_mode, processed
        self.requests: list[tuple[str, dict]] = []  # path and body, as they came
        self.faults: list[str] = []  # each befalls one request to `fault_path`, in order
        self.fault_path = "/v1/completions"
        self.always = ""  # a fault that befalls every one
        self.dies_after = 10**9  # completions after which it answers no more
        self.lock = threading.Lock()
        handler = type("Bound", (Handler,), {"fake": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def count(self, path):
        return sum(path == p for p, _ in self.requests)

    def take_fault(self, path):
        if self.count("/v1/completions") > self.dies_after:
            return "drop"
        if path != self.fault_path:
            return ""
        return self.faults.pop(0) if self.faults else self.always

    def reload(self, folder):
        weights = load_file(Path(folder) / "model.safetensors")
        missing, _ = self.model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"}  # tied

    def complete(self, body):
        prompt, n = body["prompt"], body["n"]
        eos, *pause = body["stop_token_ids"]
        with torch.no_grad():
            sampler = KVSampler(self.model, eos_id=eos, pad_id=0, seed=body["seed"])
            rollout = sampler.sample(
                [prompt],
                num_samples=n,
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"],
                pause_ids=pause,
            )
            rows = zip(rollout.completion_ids, rollout.logprob, rollout.truncated, strict=True)
            return [
                {
                    "index": i,
                    "token_ids": ids,
                    "finish_reason": "length" if cut else "stop",
                    "logprobs": {"token_logprobs": self.report(prompt, ids, logprob).tolist()},
                }
                for i, (ids, logprob, cut) in enumerate(rows)
            ]

    def report(self, prompt, ids, logprob):
        if self.processed:
            return logprob
        logits = self.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


class Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = urlsplit(self.path).path
        self.answer(path, {}, self.fake.take_fault(path))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = urlsplit(self.path).path
        with self.fake.lock:
            self.fake.requests.append((path, body))
            fault = self.fake.take_fault(path)
        self.answer(path, body, fault)

    def answer(self, path, body, fault):
        if fault == "hang":
            time.sleep(2.0)
        elif fault == "drop":
            self.connection.close()
            return
        elif fault.isdigit():
            self.send(int(fault), {"error": {"message": f"made to fail with {fault}"}})
            return
        if path == "/health":
            self.send(200, None)
        elif path == "/v1/models":
            self.send(200, {"data": [{"id": "tiny"}]})
        elif path == "/v1/completions":
            with self.fake.lock:
                choices = self.fake.complete(body)
            self.send(200, {"choices": spoil(choices, fault)}, fault)
        elif path == "/collective_rpc" and self.fake.dev_mode:
            assert body["method"] == "reload_weights"
            if fault != "stale":
                self.fake.reload(body["kwargs"]["weights_path"])
            self.send(200, {"results": [None]})
        elif path == "/reset_prefix_cache" and self.fake.dev_mode:
            self.send(200, {"success": fault != "busy"})
        else:
            self.send(404, {"detail": "Not Found"})

    def send(self, status, content, fault=""):
        text = b"" if content is None else json.dumps(content).encode()
        with contextlib.suppress(OSError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if fault == "truncated" else text)


def spoil(choices, fault):
    """The answer with one thing wrong."""
    first = choices[0]
    if fault == "one logprob less":
        first["logprobs"]["token_logprobs"].pop()
    elif fault == "one choice less":
        choices.pop()
    elif fault == "no token ids":
        del first["token_ids"]
    elif fault == "no tokens":
        first["token_ids"], first["logprobs"]["token_logprobs"] = [], []
    elif fault == "unknown token":
        first["token_ids"][0] = 10**6
    elif fault == "too long":
        first["token_ids"] *= 50
        first["logprobs"]["token_logprobs"] *= 50
    elif fault == "aborted":
        first["finish_reason"] = "abort"
    elif fault == "not at its end":
        first["finish_reason"] = "stop"
        first["token_ids"][-1] = 5
    elif fault == "positive":
        first["logprobs"]["token_logprobs"][0] = 0.5
    elif fault == "not a number":
        first["logprobs"]["token_logprobs"][0] = None
    return choices
