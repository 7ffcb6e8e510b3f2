"""Preferences with turns as agents write them, and a chat template for them."""

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
USER = {"role": "user", "content": "Add 1 and 2."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "content": "3"}
ANSWER = {"role": "assistant", "content": "It is 3."}
WRONG = {"role": "assistant", "content": "It is 4."}
# Writes what models with tools write: the tools first, calls as JSON, and the name of a tool.
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)

ROWS = {
    "a result, then an answer": {"prompt": [USER, CALLING, RESULT], "chosen": [ANSWER], "rejected": [WRONG]},
    "the calls are part of the responses": {
        "prompt": [USER],
        "chosen": [CALLING, RESULT, ANSWER],
        "rejected": [{**ANSWER, "content": "I guess 3."}],
    },
    "a call is judged": {
        "prompt": [USER],
        "chosen": [CALLING],
        "rejected": [{**CALLING, "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": 7}}}]}],
    },
    "a call with a text": {"prompt": [USER], "chosen": [{**CALLING, "content": "Let me add."}], "rejected": [WRONG]},
    "reasoning": {
        "prompt": [{"role": "system", "content": "Be brief."}, USER],
        "chosen": [{**ANSWER, "reasoning_content": "1 + 2 = 3"}],
        "rejected": [WRONG],
    },
    "no prompt": {"chosen": [USER, CALLING, RESULT, ANSWER], "rejected": [USER, CALLING, RESULT, WRONG]},
}
