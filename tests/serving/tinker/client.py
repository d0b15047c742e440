"""Runs in the Python of an unmodified client of the Tinker API, without Graft: a script of calls in, its answers out as JSON.

python client.py URL KEY SCRIPT
"""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

tinker: Any = importlib.import_module("tinker")
types: Any = tinker.types
# Older releases make clients at once, newer ones promise them. `.result()` reads both.
for made in (tinker.TrainingClient, tinker.SamplingClient):
    if not hasattr(made, "result"):
        made.result = lambda self: self


def datum(ids, **fields):
    """A datum of tokens, with its fields as lists, or as (shape, list) for more than one dimension."""
    kinds = {"target_tokens": "int64"}
    data = {}
    for name, given in fields.items():
        shape, values = given if isinstance(given, tuple) else ([len(given)], given)
        data[name] = types.TensorData(data=values, dtype=kinds.get(name, "float32"), shape=shape)
    return types.Datum(model_input=types.ModelInput.from_ints(ids), loss_fn_inputs=data)


def shown(output):
    return {
        "logprobs": [each["logprobs"].data for each in output.loss_fn_outputs],
        "shapes": [each["logprobs"].shape for each in output.loss_fn_outputs],
        "metrics": output.metrics,
    }


def refused(work):
    try:
        return ["answered", repr(work())]
    except Exception as error:
        return [type(error).__name__, str(getattr(error, "category", "")), str(error)]


def every_call(service, asked):
    """All calls of the protocol's least set, and the listing."""
    found: dict[str, Any] = {"models": [each.model_name for each in service.get_server_capabilities().supported_models]}
    base, ids, targets = asked["base"], asked["ids"], asked["targets"]
    training = service.create_lora_training_client(base, rank=4, seed=7, user_metadata={"why": "test"}).result()
    info = training.get_info()
    found["info"] = [info.model_id, info.model_data.model_name, info.is_lora, info.lora_rank]
    data = [datum(each, target_tokens=its) for each, its in zip(ids, targets, strict=True)]
    found["before"] = shown(training.forward(data, "cross_entropy").result())
    for rate in (1e-2, 1e-3):
        first = training.forward_backward(data[:1], "cross_entropy")
        rest = training.forward_backward(data[1:], "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=rate))
        found.setdefault("steps", []).append([first.result().metrics, rest.result().metrics, step.result().metrics])
    found["after"] = shown(training.forward(data, "cross_entropy").result())
    saved = training.save_state("there").result().path
    found["saved"] = saved
    found["again"] = refused(lambda: training.save_state("there").result())
    found["still"] = shown(training.forward(data, "cross_entropy").result())
    other = service.create_training_client_from_state_with_optimizer(saved).result()
    found["other"] = shown(other.forward(data, "cross_entropy").result())
    training.load_state(saved).result()
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(ids[0])
    params = types.SamplingParams(max_tokens=5, temperature=1.0, seed=3, stop=[])
    drawn = sampler.sample(prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
    found["drawn"] = [[each.tokens, each.logprobs, each.stop_reason] for each in drawn.sequences]
    found["prompt"], found["top"] = drawn.prompt_logprobs, drawn.topk_prompt_logprobs
    path = training.save_weights_for_sampler("to-sample").result().path
    named = service.create_sampling_client(model_path=path).result()
    found["scored"] = named.compute_logprobs(types.ModelInput.from_ints([*ids[0], *found["drawn"][0][0]])).result()
    bare = service.create_sampling_client(base_model=base).result()
    found["bare"] = bare.compute_logprobs(prompt).result()
    training.forward_backward(data, "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=0.1)).result()
    again = sampler.sample(prompt, 2, params).result()
    found["unmoved"] = [[each.tokens, each.logprobs] for each in again.sequences]
    rest = service.create_rest_client()
    found["runs"] = [each.training_run_id for each in rest.list_training_runs().result().training_runs]
    found["checkpoints"] = [each.tinker_path for each in rest.list_checkpoints(info.model_id).result().checkpoints]
    weights = rest.get_weights_info_by_tinker_path(saved).result()
    found["weights"] = [weights.base_model, weights.lora_rank, weights.train_mlp]
    rest.set_checkpoint_ttl_from_tinker_path(path, 1000).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    found["left"] = [each.tinker_path for each in rest.list_checkpoints(info.model_id).result().checkpoints]
    return found


def losses(service, asked):
    """One pass and one step for each loss."""
    found = {}
    for name, (loss, config, rows) in asked["losses"].items():
        training = service.create_lora_training_client(
            asked["base"], rank=4, seed=7, user_metadata=asked["labels"]
        ).result()
        if asked["start"]:
            training.load_state(asked["start"]).result()
        data = [datum(ids, **{key: (shape, values) for key, (shape, values) in fields.items()}) for ids, fields in rows]
        found[name] = shown(training.forward_backward(data, loss, config).result())
        training.optim_step(types.AdamParams(**asked["adam"])).result()
        found[name]["saved"] = training.save_state(name).result().path
    return found


def train(service, asked):
    """Some steps of one adapter."""
    training = service.create_lora_training_client(
        asked["base"], rank=asked["rank"], seed=asked["seed"], user_metadata=asked["labels"]
    ).result()
    data = [datum(each, target_tokens=its) for each, its in zip(asked["ids"], asked["targets"], strict=True)]
    found = []
    for _ in range(asked["steps"]):
        passed = training.forward_backward(data, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2, **asked.get("adam", {}))).result()
        found.append(passed.result().metrics["loss:sum"])
    return found


def clients(service, asked):
    """Many clients, each with a connection and a session of its own: one after the other, and all at once."""

    def one(own):
        service = tinker.ServiceClient(base_url=asked["url"], api_key=asked["key"])
        return train(service, {**asked, **own})

    alone = [one(own) for own in asked["clients"]]
    with ThreadPoolExecutor(len(alone)) as pool:
        return {"alone": alone, "together": list(pool.map(one, asked["clients"]))}


def tenants(service, asked):
    """Some tenants at once, each with steps, a checkpoint, a sampler and samples of it."""

    def one(own):
        training = service.create_lora_training_client(
            asked["base"], rank=own["rank"], seed=1, user_metadata=own["labels"]
        ).result()
        data = [datum(each, target_tokens=its) for each, its in zip(own["ids"], own["targets"], strict=True)]
        found = {"losses": [], "drawn": []}
        for number in range(4):
            passed = training.forward_backward(data, "cross_entropy")
            step = training.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-2))
            found["losses"].append([passed.result().metrics["loss:sum"], step.result().metrics["grad_norm"]])
            if number == 1:
                path = training.save_state("kept").result().path
        training.load_state_with_optimizer(path).result()
        found["losses"].append([training.forward(data, "cross_entropy").result().metrics["loss:sum"], 0.0])
        sampler = training.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints(own["ids"][0])
        futures = [
            sampler.sample(prompt, 1, types.SamplingParams(max_tokens=3, seed=seed, stop=[])) for seed in range(6)
        ]
        found["drawn"] = [each.result().sequences[0].tokens for each in futures]
        return found

    with ThreadPoolExecutor(len(asked["tenants"])) as pool:
        return list(pool.map(one, asked["tenants"]))


def samples(service, asked):
    """Many samples at once by one poller, one that is given up, a sampler that is shared, and routes that are refused."""
    if "target_prompt_logprobs" not in inspect.signature(tinker.SamplingClient.sample).parameters:
        return None
    base, prompt = asked["base"], types.ModelInput.from_ints(asked["ids"][0])
    sampler, found = service.create_sampling_client(base_model=base).result(), {}

    def drawn(own, count):
        params = [types.SamplingParams(max_tokens=4, seed=seed, stop=[]) for seed in range(count)]
        futures = [own.sample(prompt, 1, each) for each in params]
        return [each.result().sequences[0].tokens for each in futures]

    found["at_once"], found["again"] = drawn(sampler, 30), drawn(sampler, 30)
    long = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=200, seed=1, stop=[]))
    time.sleep(0.2)
    (long.future() if hasattr(long, "future") else long).cancel()
    shared = pickle.loads(pickle.dumps(sampler))
    found["shared"] = drawn(shared, 3)
    found["failed"] = refused(lambda: sampler.sample(prompt, 1, types.SamplingParams(max_tokens=2, top_p=7.0)).result())
    targets = [[token, (token + 1) % 200, -1] for token in asked["ids"][0][1:]]
    one = types.SamplingParams(max_tokens=1, seed=5, stop=[])
    for name, table in {
        "dense": types.TensorData(data=sum(targets, []), dtype="int64", shape=[len(targets), 3]),
        "sparse": types.TensorData(
            data=[row[0] for row in targets],
            dtype="int64",
            shape=[len(targets), 3],
            sparse_crow_indices=list(range(len(targets) + 1)),
            sparse_col_indices=[0] * len(targets),
        ),
    }.items():
        drawn_ = sampler.sample(
            prompt,
            1,
            one,
            include_prompt_logprobs=True,
            target_prompt_logprobs=table,
            prompt_alt_tokens_k=50,
            topk_prompt_logprobs=20,
        ).result()
        answer, alt = drawn_.target_prompt_logprobs, drawn_.prompt_alt_tokens
        found[name] = [answer.data, answer.shape, answer.sparse_crow_indices, drawn_.prompt_logprobs]
        found["alt"] = [alt.tokens.data, alt.logprobs.data, alt.tokens.shape, drawn_.topk_prompt_logprobs]
    rest = service.create_rest_client()
    training = service.create_lora_training_client(base, rank=2).result()
    path = training.save_state("there").result().path
    run = training.get_info().model_id
    for name, work in {
        "publish": lambda: rest.publish_checkpoint_from_tinker_path(path).result(),
        "urls": lambda: rest.get_external_weights_urls(path.replace("/weights/", "/external_weights/")).result(),
        "project": lambda: rest.assign_session_project(run.partition(":")[0], "p").result(),
        "trace": lambda: rest.export_session_trace(run.partition(":")[0]).result(),
        "copy": lambda: rest.copy_weights(path, destination_project_id="p").result(),
    }.items():
        found[name] = refused(work)
    found["run"] = rest.get_training_run_by_tinker_path(path).result().training_run_id == run
    found["all"] = [
        each.tinker_path for each in rest.list_user_checkpoints().result().checkpoints if each.tinker_path == path
    ]
    return found


def refusals(service, asked):
    """What is refused, in turn, by one client that goes on."""
    base, found = asked["base"], {}
    found["base"] = refused(lambda: service.create_lora_training_client("no/such-base", rank=4).result())
    found["rank"] = refused(lambda: service.create_lora_training_client(base, rank=0).result())
    training = service.create_lora_training_client(base, rank=4, seed=7).result()
    good = datum([5, 6], target_tokens=[6, 7])
    for name, (data, loss, config) in {
        "key": ([datum([5, 6], target_tokens=[6, 7], mask=[1.0, 1.0])], "cross_entropy", None),
        "length": ([datum([5, 6], target_tokens=[6])], "cross_entropy", None),
        "loss": ([good], "stable_reinforce", None),
        "setting": ([good], "cross_entropy", {"beta": 1.0}),
        "token": ([datum([5, 10**6], target_tokens=[6, 7])], "cross_entropy", None),
        "nan": ([datum([5, 6], target_tokens=[6, 7], weights=[float("nan"), 1.0])], "cross_entropy", None),
    }.items():
        found[name] = refused(
            lambda data=data, loss=loss, config=config: training.forward_backward(data, loss, config).result()
        )
    if hasattr(training, "save_weights_external"):
        found["external"] = refused(lambda: training.save_weights_external("out").result())
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=2)
    found["room"] = refused(lambda: sampler.sample(types.ModelInput.from_ints([5] * 1000), 1, params).result())
    found["after"] = training.forward([good], "cross_entropy").result().metrics
    return found


CALLS = {each.__name__: each for each in (every_call, losses, train, clients, tenants, samples, refusals)}


def main() -> None:
    url, key, script = sys.argv[1:]
    asked = {**json.loads(script), "url": url, "key": key}
    service = tinker.ServiceClient(base_url=url, api_key=key)
    found = CALLS[asked["call"]](service, asked)
    if hasattr(service, "close"):
        service.close("success")
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
