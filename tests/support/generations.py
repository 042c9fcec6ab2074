"""Generations of each format, and the items that they read as."""

# ruff: noqa: RUF001 - DeepSeek spells its tokens with full-width bars

from __future__ import annotations

__all__ = ["CASES", "short"]

CASES: list[tuple[str, str, list[tuple[str, ...]]]] = [
    # qwen3_coder: types by the schema, text around and between
    (
        "qwen3_coder",
        "a <tool_call>\n<function=f>\n<parameter=s>\n 12 \n</parameter>\n<parameter=i>\n12\n</parameter>\n"
        "</function>\n</tool_call> b <tool_call><function=g></function></tool_call> c",
        [
            ("text", "a "),
            ("call", "f", '{"s": " 12 ", "i": 12}'),
            ("text", " b "),
            ("call", "g", "{}"),
            ("text", " c"),
        ],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=f><parameter=o>\nnull\n</parameter><parameter=o>\n7\n</parameter>"
        "<parameter=u>2</parameter><parameter=p>{x}</parameter><parameter=n>1.10</parameter>"
        "<parameter=b>True</parameter></function></tool_call>",
        [("call", "f", '{"o": null, "o": "7", "u": "2", "p": "{x}", "n": 1.10, "b": true}')],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=f><parameter=s>a</parameter> <b>\n\n</parameter></function></tool_call>",
        [("call", "f", '{"s": "a</parameter> <b>\\n"}')],
    ),
    (
        "qwen3_coder",
        '<tool_call><function=other><parameter=k>{"a": [1]}</parameter><parameter=l>NaN</parameter>'
        "</function></tool_call>",
        [("call", "other", '{"k": {"a": [1]}, "l": "NaN"}')],
    ),
    # glm45
    (
        "glm45",
        "x\n<tool_call>f\n<arg_key>s</arg_key>\n<arg_value> 1\n</arg_value>\n<arg_key>i</arg_key>\n"
        "<arg_value>1</arg_value>\n</tool_call>",
        [("text", "x\n"), ("call", "f", '{"s": " 1\\n", "i": 1}')],
    ),
    (
        "glm45",
        "<tool_call>g</tool_call><tool_call>f<arg_key>s</arg_key><arg_value></arg_value></tool_call>",
        [("call", "g", "{}"), ("call", "f", '{"s": ""}')],
    ),
    # llama3_json
    (
        "llama3_json",
        '{"name": "f", "parameters": {"a": {"b": 1.0}}}',
        [("call", "f", '{"a": {"b": 1.0}}')],
    ),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "arguments": {"x": null}} done',
        [("call", "f", "{}"), ("call", "g", '{"x": null}'), ("text", " done")],
    ),
    ("llama3_json", '{"name": "f", "parameters": {}}; so', [("call", "f", "{}"), ("text", "; so")]),
    ("llama3_json", '{"name": "f", "parameters": {}} ;', [("call", "f", "{}")]),
    ("llama3_json", '<|python_tag|>search.call(query="é")', [("call", "search", '{"query": "é"}')]),
    ("llama3_json", '{"name": "Bob", "age": 3}', [("text", '{"name": "Bob", "age": 3}')]),
    ("llama3_json", 'see {"name": "f", "parameters": {}}', [("text", 'see {"name": "f", "parameters": {}}')]),
    # pythonic
    (
        "pythonic",
        "a «P[f(a=-1, b='x', c=[True, None, (1,)]), g.h(d={'k': false})]P» b",
        [
            ("text", "a "),
            ("call", "f", '{"a": -1, "b": "x", "c": [true, null, [1]]}'),
            ("call", "g.h", '{"d": {"k": false}}'),
            ("text", " b"),
        ],
    ),
    ("pythonic", "«Pf()P»", [("call", "f", "{}")]),
    ("pythonic", r"«P[f(p='C:\d', u='\ud800')]P»", [("call", "f", r'{"p": "C:\\d", "u": "\ud800"}')]),
    # mistral
    (
        "mistral",
        'a [TOOL_CALLS] [{"name": "f", "arguments": {"a":  1}}, {"name": "g", "arguments": {}}] b',
        [("text", "a "), ("call", "f", '{"a":  1}'), ("call", "g", "{}"), ("text", " b")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdefgh1[ARGS]{"b": {}} after',
        [("call", "f", '{"a": 1}'), ("call", "g", '{"b": {}}'), ("text", " after")],
    ),
    ("mistral", '[TOOL_CALLS]f{"a": "]"}', [("call", "f", '{"a": "]"}')]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "[ARGS]"}}]',
        [("call", "f", '{"a": "[ARGS]"}')],
    ),
    ("mistral", "[THINK]hm[TOOL_CALLS][/THINK]yes", [("think", "hm[TOOL_CALLS]"), ("text", "yes")]),
    # deepseek_v3
    (
        "deepseek_v3",
        'a«D«dfunction|sep|f\n```json\n{"a": "```"}\n```d»\n«dfunction|sep|g\n```json\n{}\n```d»D»b',
        [("text", "a"), ("call", "f", '{"a": "```"}'), ("call", "g", "{}"), ("text", "b")],
    ),
    ("deepseek_v3", '«D«df|sep|{"a": 1}d»«dg|sep|d»D»', [("call", "f", '{"a": 1}'), ("call", "g", "{}")]),
    # kimi_k2
    (
        "kimi_k2",
        'a«K«kfunctions.f:0|arg|{"a": 1}k»«kfunctions.g.h:1|arg|{}k»K»b',
        [("text", "a"), ("call", "f", '{"a": 1}'), ("call", "g.h", "{}"), ("text", "b")],
    ),
    # gpt_oss
    (
        "gpt_oss",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>Let me see."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
        '{"a":  1}<|call|>',
        [("think", "hm"), ("text", "Let me see."), ("call", "f", '{"a":  1}')],
    ),
    (
        "gpt_oss",
        "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|end|>"
        "<|start|>assistant to=functions.g<|channel|>commentary<|message|><|call|>"
        "<|start|>assistant<|channel|>final<|message|>done<|return|>",
        [("call", "f", "{}"), ("call", "g", "{}"), ("text", "done")],
    ),
    ("gpt_oss", "<|channel|>analysis<|message|>cut", [("think", "cut")]),
    ("gpt_oss", "<|channel|>analysis", [("text", "<|channel|>analysis")]),
    ("gpt_oss", "no harmony at all", [("text", "no harmony at all")]),
    (
        "gpt_oss",
        "<|channel|>final<|message|>a<|end|><|start|>user<|message|>b<|end|>c",
        [("text", "a"), ("text", "<|start|>user<|message|>b<|end|>c")],
    ),
    # gemma4: types as they are written
    (
        "gemma4",
        "a «Gf{n:-1.10e-05,o:null,s:~12~,p:{k:[true,~x,y}~,{}],l:[]}}G» b «Gg{}G»c",
        [
            ("text", "a "),
            (
                "call",
                "f",
                '{"n": -1.10e-05, "o": null, "s": "12", "p": {"k": [true, "x,y}", {}], "l": []}}',
            ),
            ("text", " b "),
            ("call", "g", "{}"),
            ("text", "c"),
        ],
    ),
    (
        "gemma4",
        r'«G f.g { a b : 1 , ~c:d~ : None , "e\n" : "\u00e9", : True, a b: "]" } G»',
        [("call", "f.g", r'{"a b": 1, "c:d": null, "e\n": "\u00e9", "": true, "a b": "]"}')],
    ),
    (
        "gemma4",
        '«Gf{s:~two\nlines "quoted" \\ <b>~,u:~~}G»',
        [("call", "f", r'{"s": "two\nlines \"quoted\" \\ <b>", "u": ""}')],
    ),
    (
        "gemma4",
        "<|channel>thought\nhm «Gf{}G»\n<channel|>«Gf{}G»"
        "<|channel>else<channel|><|channel>thought\n<channel|>yes",
        [
            ("think", "hm <|tool_call>call:f{}<tool_call|>"),
            ("call", "f", "{}"),
            ("think", "else"),
            ("think", ""),
            ("text", "yes"),
        ],
    ),
    ("gemma4", "<|channel>thought\ncut", [("think", "cut")]),
    ("gemma4", "a <think> b", [("text", "a <think> b")]),
    # atem
    (
        "atem",
        " to=self<|message|>hm «A<|eom|><|start|>assistant to=user<|message|>Let me see.<|eom|>"
        '<|start|>assistant to=f<|message|>«A\n<i:"f">\n<p:"s"> 12\n</p:>\n<p:"i">12</p:>\n</i:>\nA»<|eom|>'
        '<|start|>assistant to=g.h<|message|>«A<i:"g.h"></i:>'
        '<i:"f"><p:"p">{x}</p:> <p:"b">true</p:></i:>A»<|eot|>',
        [
            ("think", "hm <atem:function_calls>"),
            ("text", "Let me see."),
            ("call", "f", '{"s": " 12\\n", "i": 12}'),
            ("call", "g.h", "{}"),
            ("call", "f", '{"p": "{x}", "b": true}'),
        ],
    ),
    (
        "atem",
        ' to=f<|message|>So: «A<i:"f"><p:"s">a</p:> <b> </i:></p:>\n</i:>\nA» and «A<i:"g"></i:>A»!',
        [
            ("text", "So: "),
            ("call", "f", '{"s": "a</atem:parameter> <b> </atem:invoke>"}'),
            ("text", " and "),
            ("call", "g", "{}"),
            ("text", "!"),
        ],
    ),
    ("atem", ' to=user<|message|>«A<i:"f"></i:>A»', [("text", '«A<i:"f"></i:>A»')]),
    ("atem", "<|message|>cut", [("text", "cut")]),
    ("atem", " to=f", [("text", " to=f")]),
    (
        "atem",
        " to=user<|message|>a<|eom|><|start|>tool f<|message|>b<|eot|>c",
        [("text", "a"), ("text", "<|start|>tool f<|message|>b<|eot|>c")],
    ),
    # minimax_m2
    (
        "minimax_m2",
        '<think>hm</think>a\n«M\n<invoke name="f">\n<parameter name="s"> 12</parameter>\n'
        '<parameter name="o">7</parameter>\n</invoke>\n<invoke name="g">\n</invoke>\nM» b',
        [
            ("think", "hm"),
            ("text", "a\n"),
            ("call", "f", '{"s": " 12", "o": "7"}'),
            ("call", "g", "{}"),
            ("text", " b"),
        ],
    ),
    (
        "minimax_m2",
        '«M<invoke name="f"><parameter name="s">a</parameter></invoke> b</parameter></invoke>M»',
        [("call", "f", '{"s": "a</parameter></invoke> b"}')],
    ),
]
"""A format, what was sampled, and the items: kind, and text or name and arguments."""


def short(text: str) -> str:
    """Spell out abbreviated markup: DeepSeek's and Kimi's is long."""
    for brief, mark in {
        "«D": "<｜tool▁calls▁begin｜>",
        "D»": "<｜tool▁calls▁end｜>",
        "«d": "<｜tool▁call▁begin｜>",
        "d»": "<｜tool▁call▁end｜>",
        "|sep|": "<｜tool▁sep｜>",
        "«K": "<|tool_calls_section_begin|>",
        "K»": "<|tool_calls_section_end|>",
        "«k": "<|tool_call_begin|>",
        "k»": "<|tool_call_end|>",
        "|arg|": "<|tool_call_argument_begin|>",
        "«P": "<|tool_call_start|>",
        "P»": "<|tool_call_end|>",
        "«G": "<|tool_call>call:",
        "G»": "<tool_call|>",
        "«A": "<atem:function_calls>",
        "A»": "</atem:function_calls>",
        "«M": "<minimax:tool_call>",
        "M»": "</minimax:tool_call>",
        "<p:": "<atem:parameter name=",
        "</p:": "</atem:parameter",
        "<i:": "<atem:invoke name=",
        "</i:": "</atem:invoke",
        "~": '<|"|>',
    }.items():
        text = text.replace(brief, mark)
    return text
