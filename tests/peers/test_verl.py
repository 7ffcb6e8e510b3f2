"""verl's reward loop gets our rewards from a pool that it takes for a vLLM server, also after a publish."""

from tests.actors.scorers import rewards_by_engine


def test_their_reward_loop_gets_our_rewards_over_http(peer, serving, exports, base, conversations):
    contract = peer("verl")
    for number, critic in enumerate(exports):
        url = serving(critic, max_replicas=1)
        request = {
            "address": url.removeprefix("http://"),
            "model": exports[0],  # after a publish the trainer still names what it was started with
            "policy": base,
            "prompts": [[{"role": "user", "content": str(one.prompt)}] for one in conversations],
            "responses": [one.response for one in conversations],
        }
        answer = contract.run("ask_verl", request)
        ours = rewards_by_engine(critic, conversations)
        when = "after a publish" if number else "before a publish"
        contract.compare(f"our /classify: RewardLoopWorker.compute_score_disrm, {when}", answer["scores"], ours)
