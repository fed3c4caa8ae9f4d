"""The prefill/decode request contracts, field by field."""

from __future__ import annotations

import copy
from math import inf
from typing import Any

import pytest

from dynctl.engines.base import Handoff, Json, Meeting
from dynctl.engines.requests import transferable
from dynctl.engines.sglang_disagg import BootstrapRoom
from dynctl.engines.trtllm_disagg import ContextFirst
from dynctl.engines.vllm_disagg import LEASE_MARGIN_S, LEASE_S, NixlPull
from dynctl.engines.vllm_mooncake import Mooncake
from dynctl.errors import EngineFailed, RequestError

CHAT: Json = {
    "model": "m",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 50,
    "stream": True,
    "stream_options": {"include_usage": True},
    "min_tokens": 5,
    "n": 1,
    "temperature": 0.5,
    "made_up": {"kept": True},
}
COMPLETION: Json = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 9, "logprobs": 2}
PARAMS: Json = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "10.0.0.5",
    "remote_port": 5600,
    "remote_block_ids": [[25, 26]],
    "tp_size": 1,
    "remote_num_tokens": 40,
    "of_a_later_release": 1,
}


def vllm_answer(**params: Any) -> Json:
    return {"choices": [{"finish_reason": "length"}], "kv_transfer_params": {**PARAMS, **params}}


def context_answer(finish: str = "length", **changes: Any) -> Json:
    params = {"request_type": "context_only", "ctx_request_id": 17, "first_gen_tokens": [523]}
    answer = {
        "choices": [{"finish_reason": finish, "disaggregated_params": params}],
        "prompt_token_ids": [4, 5],
    }
    return {**answer, **changes}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"prompt": "text"}, True),
        ({"prompt": [1, 2, 3]}, True),
        ({"prompt": ["text"]}, True),
        ({"prompt": [[1, 2]], "n": 1, "best_of": None}, True),
        ({"messages": []}, True),
        ({"prompt": ["a", "b"]}, False),
        ({"prompt": [[1], [2]]}, False),
        ({"prompt_embeds": ["a", "b"]}, False),
        ({"messages": [], "n": 2}, False),
        ({"prompt": "a", "best_of": 3}, False),
        ({"prompt": "a", "use_beam_search": True}, False),
        ({"prompt": "a", "echo": True}, True),
        ({"prompt": "a", "logprobs": 1}, True),
        ({"prompt": "a", "prompt_logprobs": None}, True),
        ({"prompt": "a", "echo": True, "logprobs": 0}, False),
        ({"messages": [], "prompt_logprobs": 0}, False),
    ],
)
def test_requests_that_can_be_split(request_: Json, expected: bool) -> None:
    assert transferable(request_) is expected
    assert NixlPull().splits(request_) is ContextFirst().splits(request_) is expected


class TestVllm:
    contract = NixlPull()

    def test_prefill_asks_for_one_token_without_streaming(self) -> None:
        before = copy.deepcopy(CHAT)
        body = self.contract.prefill_body(CHAT, {})
        assert before == CHAT
        assert body == {
            "model": "m",
            "messages": CHAT["messages"],
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "stream": False,
            "n": 1,
            "temperature": 0.5,
            "made_up": {"kept": True},
            "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
        }

    def test_prefill_of_a_completion_has_no_chat_field(self) -> None:
        body = self.contract.prefill_body(COMPLETION, {})
        assert body["max_tokens"] == 1
        assert not body.keys() & {"max_completion_tokens", "logprobs", "n"}

    def test_decode_gets_the_request_and_the_params_unchanged(self) -> None:
        handoff = self.contract.handoff(vllm_answer(), 100.0)
        assert self.contract.decode_body(CHAT, handoff, {}) == {**CHAT, "kv_transfer_params": PARAMS}
        assert handoff.expires_at_s == 100.0 + LEASE_S - LEASE_MARGIN_S
        assert not handoff.finished

    def test_foreign_params_never_reach_an_engine(self) -> None:
        foreign = {**CHAT, "kv_transfer_params": {"do_remote_prefill": True, "remote_port": 1}}
        assert "kv_transfer_params" not in self.contract.decode_body(foreign, None, {})
        assert "remote_port" not in self.contract.prefill_body(foreign, {})["kv_transfer_params"]

    def test_several_sequences_never_share_params(self) -> None:
        handoff = Handoff(params=PARAMS, expires_at_s=1.0)
        for request in ({**CHAT, "n": 2}, {"prompt": ["a", "b"]}):
            assert self.contract.decode_body(request, handoff, {}) == request

    @pytest.mark.parametrize(
        "missing", ["remote_engine_id", "remote_request_id", "remote_host", "remote_port", "tp_size"]
    )
    def test_incomplete_params_are_refused(self, missing: str) -> None:
        with pytest.raises(EngineFailed, match=missing):
            self.contract.handoff(vllm_answer(**{missing: None}), 0.0)

    @pytest.mark.parametrize("blocks", [None, [], [[]], [[], []], "x", [7]])
    def test_params_without_blocks_are_refused(self, blocks: object) -> None:
        with pytest.raises(EngineFailed, match="no blocks"):
            self.contract.handoff(vllm_answer(remote_block_ids=blocks), 0.0)

    def test_one_filled_group_is_enough(self) -> None:
        self.contract.handoff(vllm_answer(remote_block_ids=[[], [3]]), 0.0)

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ({"error": {"message": "full"}}, "full"),
            ({"error": "full"}, "full"),
            ({}, "without choices"),
            ({"choices": []}, "without choices"),
            ({"choices": [{"finish_reason": "abort"}]}, "'abort'"),
            ({"choices": [{"finish_reason": "error"}]}, "'error'"),
            ({"choices": [{"finish_reason": "length"}]}, "without kv_transfer_params"),
            (vllm_answer(do_remote_prefill=False), "do_remote_prefill"),
        ],
    )
    def test_answers_that_hand_nothing_over(self, answer: Json, reason: str) -> None:
        with pytest.raises(EngineFailed, match=reason):
            self.contract.handoff(answer, 0.0)

    def test_nothing_links_the_legs_beforehand(self) -> None:
        assert self.contract.link({}, Meeting("http://p:1", 0, 5)) == {}
        assert self.contract.order == "prefill_first"


class TestSglang:
    contract = BootstrapRoom()

    def test_both_legs_carry_prefills_bootstrap_and_the_room(self) -> None:
        link = self.contract.link(CHAT, Meeting("http://10.0.0.5:30000", 8998, 2**63 - 1))
        assert link == {
            "bootstrap_host": "10.0.0.5",
            "bootstrap_port": 8998,
            "bootstrap_room": 2**63 - 1,
            "rid": f"{2**63 - 1:032x}",
        }
        prefill = self.contract.prefill_body(CHAT, link)
        assert prefill == {**CHAT, **link} == self.contract.decode_body(CHAT, None, link)
        assert self.contract.order == "concurrent"
        assert self.contract.splits(CHAT)

    @pytest.mark.parametrize("request_", [{"n": 4}, {"n": 0}, {"use_beam_search": True}])
    def test_several_samples_would_share_one_room(self, request_: Json) -> None:
        with pytest.raises(RequestError, match="several samples"):
            self.contract.splits(request_)

    def test_each_prompt_of_a_batch_has_a_room_of_the_same_rank_and_a_name_to_abort_by(self) -> None:
        batch = {"prompt": ["a", "b", "c"]}
        link = self.contract.link(batch, Meeting("http://p:1", 8998, 9, ranks=4))
        assert link["bootstrap_room"] == [9, 13, 17]
        assert [way.body["rid"] for way in self.contract.abort(link)] == link["rid"]
        assert len(set(link["rid"])) == 3
        single = self.contract.link({"prompt": [1, 2, 3]}, Meeting("http://p:1", 8998, 9, ranks=4))
        assert single["bootstrap_room"] == 9
        assert [way.path for way in self.contract.abort(single)] == ["/abort_request"]

    def test_a_clients_own_room_is_replaced(self) -> None:
        link = self.contract.link({}, Meeting("http://p:1", 8998, 4))
        mine = {"bootstrap_room": 1, "disagg_prefill_dp_rank": 3, "rid": "x"}
        body = self.contract.decode_body(mine, None, link)
        assert body == link

    @pytest.mark.parametrize(
        ("url", "port", "room"),
        [("nowhere", 1, 1), ("http://p:1", 0, 1), ("http://p:1", 1, 0), ("http://p:1", 1, 2**63)],
    )
    def test_link_without_a_bootstrap_address(self, url: str, port: int, room: int) -> None:
        with pytest.raises(EngineFailed):
            self.contract.link({}, Meeting(url, port, room))

    def test_prefill_answer_is_dropped_but_for_errors(self) -> None:
        assert self.contract.handoff({"choices": []}, 0.0) == Handoff(params={}, expires_at_s=inf)
        aborted = {"choices": [{"finish_reason": None}, {"finish_reason": "abort"}]}
        for answer in ({"error": {"message": "x"}}, {"object": "error", "message": "x"}, aborted):
            with pytest.raises(EngineFailed):
                self.contract.handoff(answer, 0.0)


class TestTrtllm:
    contract = ContextFirst()

    def test_context_leg_keeps_max_tokens(self) -> None:
        body = self.contract.prefill_body(CHAT, {})
        assert (body["max_tokens"], body["stream"]) == (50, False)
        assert "stream_options" not in body
        assert body["disaggregated_params"] == {"request_type": "context_only"}

    def test_generation_leg_of_a_chat(self) -> None:
        handoff = self.contract.handoff(context_answer(), 10.0)
        body = self.contract.decode_body(CHAT, handoff, {})
        assert body["disaggregated_params"] == {
            "request_type": "generation_only",
            "ctx_request_id": 17,
            "first_gen_tokens": [523],
        }
        assert (body["prompt_token_ids"], body["messages"]) == ([4, 5], CHAT["messages"])
        assert handoff.expires_at_s == 60.0

    def test_generation_leg_of_a_completion_has_ids_as_prompt(self) -> None:
        handoff = self.contract.handoff(context_answer("not_finished"), 0.0)
        body = self.contract.decode_body(COMPLETION, handoff, {})
        assert body["prompt"] == [4, 5]
        assert "prompt_token_ids" not in body

    def test_finished_context_is_the_whole_answer(self) -> None:
        handoff = self.contract.handoff(context_answer("stop"), 0.0)
        assert handoff.finished
        with pytest.raises(EngineFailed, match="whole"):
            self.contract.decode_body(CHAT, handoff, {})

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ({"error": "x"}, "error"),
            ({"object": "error"}, "error"),
            ({"choices": []}, "choices"),
            ({"choices": [{"finish_reason": "length"}], "prompt_token_ids": [1]}, "ctx_request_id"),
            (context_answer(prompt_token_ids=None), "prompt_token_ids"),
        ],
    )
    def test_incomplete_context_answers_are_refused(self, answer: Json, reason: str) -> None:
        with pytest.raises(EngineFailed, match=reason):
            self.contract.handoff(answer, 0.0)

    def test_plain_without_a_handoff_or_with_several_sequences(self) -> None:
        assert self.contract.decode_body({**CHAT, "disaggregated_params": {}}, None, {}) == CHAT
        handoff = self.contract.handoff(context_answer(), 0.0)
        assert self.contract.decode_body({**CHAT, "n": 3}, handoff, {}) == {**CHAT, "n": 3}

    def test_no_field_is_sent_that_a_release_does_not_know(self) -> None:
        assert self.contract.link({}, Meeting("http://p:1", 0, 5)) == {}
        assert self.contract.order == "prefill_first"

    @pytest.mark.parametrize("version", ["", "1.2.1", "dev"])
    def test_a_release_that_may_not_know_the_id_is_sent_none(self, version: str) -> None:
        assert self.contract.link({}, Meeting("http://p:1", 0, 5, version=version)) == {}

    @pytest.mark.parametrize("version", ["1.3.0rc2", "1.10", "2.0"])
    @pytest.mark.parametrize("room", [1, 2**42, 2**63 - 1])
    def test_later_releases_get_the_same_id_on_both_legs(self, version: str, room: int) -> None:
        link = self.contract.link({}, Meeting("http://p:1", 0, room, version=version))
        assert 2**42 <= link["disagg_request_id"] < 2**63
        prefill = self.contract.prefill_body(CHAT, link)
        assert prefill["disaggregated_params"] == {"request_type": "context_only", **link}
        handoff = self.contract.handoff(context_answer(), 0.0)
        assert self.contract.decode_body(CHAT, handoff, link)["disaggregated_params"].items() >= link.items()


class TestMooncake:
    contract = Mooncake()
    query = (
        b'{"1": {"engine_id": "e_dp1", "worker_addr": {}}, "0": {"engine_id": "e_dp0", "worker_addr": {}}}'
    )

    def link(self, request: Json = CHAT, room: int = 7) -> Json:
        peers = self.contract.peers(self.query)
        meeting = Meeting("http://10.0.0.5:8000", 8998, room, ranks=2, peers=peers)
        return self.contract.link(request, meeting)

    def test_legs_meet_at_the_rank_that_prefills(self) -> None:
        link = self.link()
        assert link["remote_engine_id"] == "e_dp1"
        assert link["remote_bootstrap_addr"] == "http://10.0.0.5:8998"
        assert link["transfer_id"] != self.link(room=9)["transfer_id"]
        assert self.contract.order == "concurrent"
        assert self.contract.abort(link) == ()

    def test_prefill_always_ends_by_length(self) -> None:
        body = self.contract.prefill_body({**CHAT, "stop": ["x"], "stop_token_ids": [1]}, self.link())
        assert (body["max_tokens"], body["max_completion_tokens"], body["stream"]) == (1, 1, False)
        assert body["ignore_eos"] is True
        assert not body.keys() & {"stop", "stop_token_ids", "min_tokens", "stream_options"}
        sent = {"do_remote_decode": True, "do_remote_prefill": False}
        assert body["kv_transfer_params"] == {**sent, "transfer_id": self.link()["transfer_id"]}

    def test_decode_gets_the_request_and_where_its_blocks_are(self) -> None:
        link = self.link()
        body = self.contract.decode_body(
            {**CHAT, "kv_transfer_params": {"remote_engine_id": "evil"}}, None, link
        )
        sent = {"do_remote_prefill": True, "do_remote_decode": False}
        assert body == {**CHAT, "kv_transfer_params": {**sent, **link}}
        assert self.contract.decode_body(CHAT, None, {}) == CHAT

    @pytest.mark.parametrize("peers", [(), ("only-rank-0",)])
    def test_a_rank_without_a_known_engine_id_is_not_asked(self, peers: tuple[str, ...]) -> None:
        with pytest.raises(EngineFailed, match="engine id"):
            self.contract.link(CHAT, Meeting("http://p:1", 8998, 7, ranks=2, peers=peers))

    @pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"1": {"engine_id": "e"}}', b'{"0": {}}'])
    def test_a_bootstrap_answer_without_engine_ids(self, answer: bytes) -> None:
        with pytest.raises(EngineFailed, match=r"engine ids|no rank"):
            self.contract.peers(answer)

    @pytest.mark.parametrize(
        "answer",
        [{"error": {"message": "x"}}, {}, {"choices": []}, {"choices": [{"finish_reason": "stop"}]}],
    )
    def test_a_prefill_whose_blocks_are_gone(self, answer: Json) -> None:
        with pytest.raises(EngineFailed):
            self.contract.handoff(answer, 0.0)
        assert not self.contract.handoff({"choices": [{"finish_reason": "length"}]}, 0.0).finished
