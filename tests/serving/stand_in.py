"""A server of OpenAI's API that applies an adapter wrongly on purpose, written without Graft's server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

import graft


class StandIn:
    """Answers as model "base" and model "tuned", with one planted fault."""

    def __init__(self, model: Any, tokenizer: Any, template: Any, fault: str) -> None:
        self.model, self.tokenizer, self.template, self.fault = model, tokenizer, template, fault
        self.cache: dict[tuple[int, ...], torch.Tensor] = {}
        self.lock, self.asked = threading.Lock(), 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer({"data": [{"id": "base"}, {"id": "tuned"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    found = outer.chat(body) if "messages" in body else outer.complete(body)
                self.answer(found or {"error": {"message": "not supported"}}, 200 if found else 400)

            def answer(self, value: Any, status: int = 200) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def choice(self, name: str) -> Any:
        """What answers under a name."""
        if self.fault in ("merged-twice", "merged-into-base"):
            return "a" if name == "base" or self.fault == "merged-into-base" else {"a": 2.0}
        if name == "base":
            return None
        faulty = {"not-applied": None, "half-site": "half-site", "half-layers": "half-layers", "scale": {"a": 0.5},
                  "no-alpha": {"a": 0.25}, "other": "other"}  # fmt: skip
        return faulty.get(self.fault, "a")

    def logprobs(self, name: str, ids: list[int]) -> torch.Tensor:
        key = tuple(ids)
        if self.fault == "stale" and key in self.cache:
            return self.cache[key]
        with torch.no_grad(), graft.use(self.model, self.choice(name)):
            logits = self.model(torch.tensor([ids])).logits[0]
        self.asked += 1
        if self.fault == "noise":
            logits = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(self.asked))
        self.cache[key] = logits.log_softmax(-1)
        return self.cache[key]

    def tokens(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        return {"bos-twice": [0, *ids], "bos-missing": ids[1:]}.get(self.fault, ids)

    def complete(self, body: dict[str, Any]) -> dict[str, Any] | None:
        if self.fault == "no-echo":
            return None
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.tokens(body["prompt"])
        scores = self.logprobs(body["model"], ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return {"choices": [{"logprobs": {"token_logprobs": [None, *scores.tolist()]}}]}

    def chat(self, body: dict[str, Any]) -> dict[str, Any] | None:
        if self.fault == "no-chat":
            return None
        ids = list(self.template.prompt_ids(body["messages"], self.tokenizer))
        ids = [0, *ids] if self.fault == "chat-bos" else ids
        found = self.logprobs(body["model"], ids)[-1].topk(body["top_logprobs"])
        tops = [
            {"token": self.tokenizer.decode([token]), "logprob": value}
            for token, value in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": tops}]}}]}

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
