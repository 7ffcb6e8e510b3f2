"""Infinity classifies an export's texts with our rewards."""


def test_infinity_classifies_with_our_raw_rewards(peer, export, texts, rewards):
    contract = peer("infinity")
    answer = contract.run("ask_infinity", {"model": export, "texts": texts})
    contract.compare("our export: engine.classify, raw_scores=True", answer["raw"], rewards)
    contract.compare("our export: engine.classify without options", answer["as_it_is"], rewards)
