"""Serve a long-document classifier over HTTP.

    python examples/serve.py outputs/classification --port 8000

needs `pip install fastapi uvicorn`. Ask by `curl localhost:8000/classify --json '{"text": "..."}'`.
Requests that come while the model is busy are batched, documents of about the same length together.
One batch runs at a time, with all threads of torch; for more, start more processes.
"""

import argparse
import asyncio
from contextlib import asynccontextmanager

import torch
from fastapi import Body, FastAPI
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import adaptive_longformer  # noqa: F401  (registers the architecture)


def batches(requests: list[tuple], max_tokens: int) -> list[list[tuple]]:
    """By length, each of at most so many tokens with its padding, or of one document."""
    found: list[list[tuple]] = []
    for request in sorted(requests, key=lambda request: len(request[0])):
        if not found or (len(found[-1]) + 1) * len(request[0]) > max_tokens:
            found.append([])
        found[-1].append(request)
    return found


async def answer_requests(queue: asyncio.Queue, classify, max_tokens: int) -> None:
    """Answers for ever; what comes meanwhile waits in the queue."""
    while True:
        requests = [await queue.get()] + [queue.get_nowait() for _ in range(queue.qsize())]
        for batch in batches(requests, max_tokens):
            try:
                answers = await asyncio.to_thread(classify, [ids for ids, _ in batch])
            except Exception as error:  # of this batch alone, and for those who asked
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # or nobody waits any more
                    failed = isinstance(answer, Exception)
                    (future.set_exception if failed else future.set_result)(answer)


def create_app(folder: str, max_tokens: int = 16384) -> FastAPI:
    """The application for a checkpoint folder; `max_tokens` bounds the memory of a batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    max_length = min(tokenizer.model_max_length, model.config.max_sequence_length)
    queue: asyncio.Queue = asyncio.Queue()

    def tokens_of(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=max_length)["input_ids"]

    @torch.inference_mode()
    def classify(documents: list[list[int]]) -> list[dict]:
        batch = tokenizer.pad({"input_ids": documents}, return_tensors="pt")
        best = model(**batch).logits.float().softmax(dim=-1).max(dim=-1)
        return [
            {"label": model.config.id2label[label], "score": score, "tokens": len(ids)}
            for ids, score, label in zip(documents, *map(torch.Tensor.tolist, best), strict=True)
        ]

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        classify([tokens_of("word " * max_length)])  # builds or loads the kernels of long documents
        worker = asyncio.create_task(answer_requests(queue, classify, max_tokens))
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/classify")
    async def of_document(text: str = Body(embed=True)) -> dict:
        future = asyncio.get_running_loop().create_future()
        await queue.put((await asyncio.to_thread(tokens_of, text), future))
        return await future

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a long-document classifier.")
    parser.add_argument("model", help="checkpoint folder or hub id")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a batch, with padding")
    args = parser.parse_args()
    import uvicorn

    uvicorn.run(create_app(args.model, args.max_tokens), host=args.host, port=args.port)
