"""The vLLM sampler against a server on a real socket: what is asked, what comes back, and every way it can go wrong."""

import pytest
import torch

from fastgrpo.trainer.data.batch import make_batch
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.sampling import http_json
from fastgrpo.trainer.sampling.rollout import SamplerError
from fastgrpo.trainer.sampling.vllm_sampler import VLLMSampler, connect
from tests.trainer.fake_vllm import FakeVLLM

EOS, PAD = 1, 0
PROMPTS = [[5, 9, 3], [7, 7, 8, 20, 31, 4, 6], [12], [5, 9, 3, 3, 3], [40, 41]]
TIMEOUT = 20.0


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(http_json, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def fake(model):
    server = FakeVLLM(model)
    yield server
    server.close()


def make(model, urls, *, timeout=TIMEOUT, temperature=0.8, seed=0, **more):
    servers = connect(urls, timeout, model.config.vocab_size)
    return VLLMSampler(
        model, servers, eos_id=EOS, seed=seed, temperature=temperature, probes=PROMPTS[:2], **more
    )


def draw(sampler, *, num_samples=3, max_new_tokens=10, temperature=0.8, **more):
    return sampler.sample(
        PROMPTS,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        **more,
    )


def change(model, by=0.3):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * parameter.std() * torch.randn_like(parameter))


def test_completions_come_with_the_policys_log_probabilities(model, fake):
    rollout = draw(make(model, fake.url))
    assert rollout.prompt_ids == [p for p in PROMPTS for _ in range(3)]
    batch = make_batch(rollout.prompt_ids, rollout.completion_ids, PAD)
    with torch.no_grad():
        trained = Policy(model, 0.8)(batch)
    assert torch.allclose(trained, torch.cat(rollout.logprob), rtol=0, atol=1e-5)
    for ids, cut in zip(rollout.completion_ids, rollout.truncated, strict=True):
        assert cut == (ids[-1] != EOS)
        assert not cut or len(ids) == 10
    assert len(set(map(tuple, rollout.completion_ids))) > len(PROMPTS)


def test_what_is_asked(model, fake):
    sampler = make(model, fake.url)
    fake.requests.clear()
    draw(sampler)
    bodies = [body for path, body in fake.requests if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in bodies) == sorted(PROMPTS)
    assert len({body["seed"] for body in bodies}) == len(PROMPTS), "one seed gives all one noise"
    body = bodies[0]
    assert body | {"prompt": 0, "seed": 0} == {
        "model": "tiny", "prompt": 0, "n": 3, "max_tokens": 10, "temperature": 0.8, "seed": 0, "logprobs": 0,
        "return_token_ids": True, "ignore_eos": True, "stop_token_ids": [EOS], "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip


def test_a_seed_repeats_and_the_state_goes_on(model, fake):
    sampler = make(model, fake.url, seed=3)
    state = sampler.rng_state
    first, second = draw(sampler), draw(sampler)
    assert first.completion_ids != second.completion_ids
    assert draw(make(model, fake.url, seed=3)).completion_ids == first.completion_ids
    sampler.rng_state = state
    assert draw(sampler).completion_ids == first.completion_ids


def test_greedy_asks_once_per_prompt_and_pauses_where_told(model, fake):
    sampler = make(model, fake.url)
    greedy = draw(sampler, temperature=0.0, num_samples=2)
    assert greedy.completion_ids[0::2] == greedy.completion_ids[1::2]
    assert fake.requests[-1][1]["n"] == 1
    ids = next(row for row in greedy.completion_ids if len(row) > 3)
    paused = draw(sampler, temperature=0.0, num_samples=1, pause_ids=[ids[2]])
    rows = paused.completion_ids
    assert any(row[-1] == ids[2] for row in rows)
    assert all(ids[2] not in row[:-1] for row in rows)


def test_prompts_are_divided_among_servers_and_weights_reach_all(model):
    servers = [FakeVLLM(model) for _ in range(2)]
    try:
        change(model)
        sampler = make(model, ", ".join(server.url + "/" for server in servers))
        for server in servers:
            server.requests.clear()
        draw(sampler)
        assert sorted(server.count("/v1/completions") for server in servers) == [2, 3]
        change(model)
        sampler.refresh()
        assert [server.count("/collective_rpc") for server in servers] == [1, 1]
        for server in servers:
            assert torch.equal(server.model.lm_head.weight, model.lm_head.weight)
    finally:
        for server in servers:
            server.close()


def test_weights_travel_through_a_folder_that_is_removed(model, fake, tmp_path):
    sampler = make(model, fake.url, folder=str(tmp_path))
    for _ in range(2):
        change(model)
        sampler.refresh()
    asked = [b["kwargs"]["weights_path"] for p, b in fake.requests if p == "/collective_rpc"]
    assert len(set(asked)) == 3, "a name twice could be served from a cache"
    assert all(path.startswith(str(tmp_path)) for path in asked)
    order = [path for path, _ in fake.requests]
    assert order.index("/collective_rpc") < order.index("/reset_prefix_cache")
    (folder,) = tmp_path.iterdir()
    assert not list(folder.iterdir())
    del sampler
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "truncated"])
def test_passing_faults_are_retried(model, fake, fault):
    sampler = make(model, fake.url)
    state = sampler.rng_state
    expected = draw(sampler)
    sampler.rng_state, fake.faults = state, [fault] * 3
    fake.requests.clear()
    assert draw(sampler).completion_ids == expected.completion_ids
    assert fake.count("/v1/completions") == len(PROMPTS) + 3


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("500", r"failed 4 times; last: .*HTTP 500.*made to fail.*Is the server up\?"),
        ("truncated", "failed 4 times; last: IncompleteRead"),
        ("400", "HTTP 400.*made to fail with 400"),
        ("one logprob less", "tokens have .* log-probabilities"),
        ("one choice less", "3 completions expected, got 2"),
        ("no token ids", "lacks 'token_ids'; token ids need vLLM 0.10.2"),
        ("no tokens", "1 to 10 tokens expected, got 0"),
        ("too long", "1 to 10 tokens expected, got"),
        ("unknown token", "a token id is outside of the"),
        ("aborted", "a completion ended by 'abort'"),
        ("not at its end", "ended by 'stop', but its end token is elsewhere"),
        ("positive", "a log-probability is above 0"),
    ],
)
def test_lasting_faults_are_errors_that_name_the_server(model, fake, fault, says):
    sampler = make(model, fake.url)
    fake.always = fault
    with pytest.raises(SamplerError, match=says) as caught:
        draw(sampler)
    assert f"{fake.url}/v1/completions" in str(caught.value)


def test_a_token_that_the_server_cannot_score_is_nan(model, fake):
    sampler = make(model, fake.url)
    fake.faults = ["not a number"]
    rollout = draw(sampler)
    assert int(torch.cat(rollout.logprob).isnan().sum()) == 1


def test_a_server_that_hangs_is_given_up_after_the_time_out(model, fake):
    sampler = make(model, fake.url, timeout=0.6)
    fake.always = "hang"
    fake.requests.clear()
    with pytest.raises(SamplerError, match=r"no answer within 0.6 s.*raise --vllm-server-timeout"):
        draw(sampler)
    assert fake.count("/v1/completions") == len(PROMPTS), "it asked again"


def test_a_dead_server(model, fake):
    sampler = make(model, fake.url)
    fake.close()
    with pytest.raises(
        SamplerError, match=rf"POST {fake.url}/v1/completions failed 4 times.*refused"
    ):
        draw(sampler)
    with pytest.raises(SamplerError, match=f"no vLLM server answers at {fake.url} after 0.1 s"):
        make(model, fake.url, timeout=0.1)


def test_a_server_that_is_still_loading_is_waited_for(model, fake):
    fake.fault_path, fake.faults = "/health", ["503", "503"]
    assert make(model, fake.url, timeout=5.0).servers[0].model == "tiny"


def test_stale_weights_far_away_are_an_error(model, fake):
    sampler = make(model, fake.url)
    change(model)
    fake.fault_path, fake.always = "/collective_rpc", "stale"
    with pytest.raises(
        SamplerError, match=r"does not sample from the policy.*Its weights are stale"
    ):
        sampler.refresh()


def test_stale_weights_close_by_are_an_error_once_the_policy_has_moved(model, fake):
    sampler = make(model, fake.url)
    fake.fault_path, fake.always = "/collective_rpc", "stale"
    with pytest.raises(SamplerError, match=r"has stale weights: .* the same to the last bit"):  # noqa: PT012
        for _ in range(40):  # each far too small to see by its size
            change(model, 1e-4)
            sampler.refresh()


def test_small_steps_that_arrive_are_no_error(model, fake):
    sampler = make(model, fake.url)
    for _ in range(10):
        change(model, 1e-3)
        sampler.refresh()
    sampler.refresh()  # nothing has changed: the same answer is the right one


def test_log_probabilities_at_another_temperature_are_named(model):
    fake = FakeVLLM(model, processed=False)
    try:
        with pytest.raises(SamplerError, match="start it with --logprobs-mode processed_logprobs"):
            make(model, fake.url, temperature=0.5)
        make(model, fake.url, temperature=1.0)
    finally:
        fake.close()


def test_a_server_without_development_mode(model):
    fake = FakeVLLM(model, dev_mode=False)
    try:
        with pytest.raises(SamplerError, match=r"(?s)HTTP 404.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
            make(model, fake.url)
    finally:
        fake.close()


def test_a_cache_that_cannot_be_reset(model, fake):
    fake.fault_path, fake.always = "/reset_prefix_cache", "busy"
    with pytest.raises(SamplerError, match="could not reset its prefix cache"):
        make(model, fake.url)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", ""])
def test_an_address_that_cannot_be_meant(url):
    with pytest.raises(ValueError, match="vllm_server_base_url must be http://HOST:PORT"):
        connect(url, 1.0, 10)


def test_the_key_is_sent(model, fake, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    (server,) = connect(fake.url, TIMEOUT, 10)
    assert server._http.headers == {"Authorization": "Bearer secret"}
