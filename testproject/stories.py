"""What the sample workflows of ``demo --many`` do: their nodes, states, errors and prices; for `many`.

Each is told by a function that takes a source of chance and gives a `Story`: the whole course of
one run, as if nothing went wrong. When runs begin, and how they end, is decided in `many`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

State = dict[str, Any]


class Step(NamedTuple):
    """A node of a run."""

    node: str
    weight: float
    """Its share of the time of the run, compared to the other steps."""
    state: State
    """The state after it."""
    tokens: int | None = None


class Story(NamedTuple):
    """The whole course of a run, as if nothing went wrong."""

    inputs: Any
    config: Any
    outputs: Any
    steps: list[Step]
    labels: dict[str, str]


class Failure(NamedTuple):
    """Something that goes wrong in a node."""

    node: str
    """The node, or how its name begins."""
    error: str
    """Type and message."""
    file: str
    line: int
    code: str
    is_transient: bool = False
    """Whether another attempt helps."""

    def text(self, node: str) -> str:
        """Return the error_message of a run that failed so, in the form that the recorder gives."""
        function = node.partition(":")[0].rstrip("-0123456789").replace("-", "_")
        return f"""{self.error}

Traceback (most recent call last):
  File "/srv/app/worker.py", line 61, in work
    graph.run(run, until=deadline)
  File "/srv/app/graph.py", line 118, in run
    state = node(state)
  File "/srv/app/{self.file}", line {self.line}, in {function}
    {self.code}
{self.error}"""


class Workflow(NamedTuple):
    """What is typical of a workflow."""

    name: str
    tell: Callable[[Random], Story]
    median_seconds: float
    sigma: float
    """How far the durations are spread: of their logarithm, which is normally distributed."""
    by_day: float
    """How often it runs by day, compared to the other workflows."""
    by_night: float
    failures: tuple[Failure, ...]
    failure_rate: float
    recent_failure_rate: float | None = None
    """The failure rate of the last days; None for the same."""
    cancel_rate: float = 0.01
    usd_per_million_tokens: float | None = None
    waits_before: str | None = None
    """The node before which it waits."""
    waits_for: str | None = None
    children: tuple[str, int, float] | None = None
    """Which workflow it starts, how many at most, and in what part of its runs."""


TENANTS = ("acme", "globex", "initech", "umbrella", "hooli", "wonka")
VENDORS = ("Northwind Paper", "Contoso Energy", "Lindgren & Söner", "Fabrikam Parts", "Café Möller")
_SENTENCES = (
    "The parties agree on a term of three years.",
    "Delivery is due within ten working days.",
    "Either side may end this agreement with three months' notice.",
    "Liability is limited to the fees of the last twelve months.",
    "The price is adjusted once a year by the consumer price index.",
    "Personal data is processed on behalf of the customer only.",
    "Defects are to be reported in writing within two weeks.",
    "The place of jurisdiction is the seat of the seller.",
)
_QUESTIONS = (
    (
        "Where is my order?",
        "search_orders",
        "It left the warehouse yesterday and arrives tomorrow.",
    ),
    ("I was charged twice.", "list_payments", "The second charge was a hold and lapses on Friday."),
    (
        "How do I change my address?",
        "get_account",
        "Under Account, Addresses. I opened it for you.",
    ),
    (
        "The lamp arrived broken.",
        "create_return",
        "A return label is in your mail; we send a new one.",
    ),
)


def invoice_extraction(rng: Random) -> Story:
    """Read an invoice, check it, and book it; a large one waits to be approved."""
    file = f"invoice-{rng.randrange(10_000, 99_999)}.pdf"
    pages, prices = rng.randint(1, 6), [round(rng.lognormvariate(5, 1.2), 2) for _ in range(4)]
    items = [
        {"position": number, "text": f"Item {rng.randrange(100, 999)}", "net": net}
        for number, net in enumerate(prices, 1)
    ]
    net = round(sum(prices), 2)
    invoice = {
        "vendor": rng.choice(VENDORS),
        "number": f"R{rng.randrange(2000, 9999)}",
        "currency": "EUR",
        "net": net,
        "vat": round(net * 0.19, 2),
        "total": round(net * 1.19, 2),
    }
    size = pages * rng.randrange(400, 700)
    steps = _Steps({"file": file})
    steps.add("fetch", 0.4, bytes=pages * rng.randrange(40_000, 90_000), pages=pages)
    steps.add("ocr", 5.0, text=[" ".join(rng.choices(_SENTENCES, k=3)) for _ in range(pages)])
    steps.add("classify", 0.6, size // 3, kind="invoice", confidence=round(rng.uniform(0.8, 1), 3))
    steps.add("extract", 3.0, size * 2, invoice={**invoice, "items": items})
    steps.add("validate", 0.2, checks={"sum": True, "vat_id": True, "duplicate": False})
    if net > 1500:
        steps.add("approve", 0.1, approved_by="finance")
    steps.add("book", 0.7, booking=f"B-{rng.randrange(100_000, 999_999)}")
    return Story(
        {"file": f"s3://inbox/{file}", "uploaded_by": _user(rng)},
        {"model": "reader-small", "prompt_version": 14, "api_key": "demo-not-a-real-key-1"},
        {"total": invoice["total"], "currency": "EUR", "vendor": invoice["vendor"]},
        steps,
        {"document": file},
    )


def support_agent(rng: Random) -> Story:
    """Answer a customer: a model calls tools until it knows enough."""
    user, (question, tool, answer) = _user(rng), rng.choice(_QUESTIONS)
    steps = _Steps({"messages": [{"role": "user", "content": question}]})
    articles = [f"kb-{rng.randrange(100, 400)}" for _ in range(3)]
    steps.add("retrieve", 0.5, 40, documents=articles)
    context = rng.randrange(900, 1600)
    for turn in range(rng.randint(1, 5)):
        arguments = {"customer": user, "page": turn + 1}
        context += rng.randrange(150, 400)
        steps.say("model", 2.0, context, role="assistant", tool=tool, arguments=arguments)
        found = [{"id": rng.randrange(10_000, 99_999), "state": "sent"} for _ in range(2)]
        steps.say(f"tool:{tool}", 0.7, None, role="tool", name=tool, content=found)
    steps.say("model", 2.5, context + 300, role="assistant", content=answer)
    steps.add("reply", 0.2, sent=True, sentiment=rng.choice(["calm", "annoyed", "happy"]))
    return Story(
        {
            "question": question,
            "channel": rng.choice(["chat", "mail"]),
            "headers": {"authorization": "Bearer demo-not-a-real-token", "accept-language": "en"},
        },
        {"model": "talker-large", "temperature": 0.2, "max_tokens": 2048, "tools": [tool]},
        {"answer": answer, "turns": len(steps)},
        steps,
        {"user": user},
    )


def document_pipeline(rng: Random) -> Story:
    """Cut a document into sections, embed each, and index them."""
    file = f"handbook-{rng.randrange(100, 999)}.md"
    steps = _Steps({"document": file})
    count = rng.randint(3, 9)
    sections: list[State] = [
        {"title": f"Section {number}", "words": rng.randrange(80, 900), "vector": None}
        for number in range(1, count + 1)
    ]
    steps.add("load", 0.3, bytes=sum(section["words"] for section in sections) * 6)
    steps.add("split", 0.2, sections=sections)
    for number, section in enumerate(sections):
        done = {**section, "vector": [round(rng.uniform(-1, 1), 4) for _ in range(8)]}
        sections = [*sections[:number], done, *sections[number + 1 :]]
        steps.add(f"embed-{number + 1}", 1.0, section["words"] * 4 // 3, sections=sections)
    steps.add("summarize", 2.5, rng.randrange(1500, 5000), summary=rng.choice(_SENTENCES))
    steps.add("index", 0.6, index={"name": "handbooks", "entries": count})
    return Story(
        {"document": f"s3://handbooks/{file}"},
        {"model": "embedder-2", "chunk_words": 900, "index_password": "demo-not-a-real-password"},
        {"sections": count, "summary": steps[-1].state["summary"]},
        steps,
        {"document": file},
    )


def nightly_import(rng: Random) -> Story:
    """Take over yesterday's data of another system, without any model."""
    steps = _Steps({"source": "erp"})
    tables = {
        "customers": rng.randrange(800, 1500),
        "orders": rng.randrange(20_000, 60_000),
        "products": rng.randrange(3000, 5000),
    }
    steps.add("download", 2.0, files=[f"{name}.csv.gz" for name in tables])
    steps.add("parse", 1.5, rows=tables)
    imported: dict[str, int] = {}
    for name, rows in tables.items():
        imported = {**imported, name: rows - rng.randrange(12)}
        steps.add(f"import-{name}", rows / 10_000 + 0.3, imported=imported)
    rejected = sum(tables.values()) - sum(imported.values())
    steps.add("reconcile", 1.0, rejected=rejected)
    steps.add("report", 0.2, mailed_to=["data@example.com"])
    return Story(
        {"source": "erp", "full": False},
        {"batch_rows": 5000, "database": {"host": "erp.internal", "password": "demo-not-real"}},
        {"imported": sum(imported.values()), "rejected": rejected},
        steps,
        {"source": "erp"},
    )


def contract_review(rng: Random) -> Story:
    """Find the clauses of a contract, and what is risky in them."""
    file = f"contract-{rng.randrange(1000, 9999)}.docx"
    texts = rng.sample(_SENTENCES, k=rng.randint(4, 8))
    clauses: list[State] = [
        {"number": number, "text": text, "risk": None} for number, text in enumerate(texts, 1)
    ]
    steps = _Steps({"file": file})
    steps.add("load", 0.3, pages=rng.randint(4, 40))
    steps.add("clauses", 3.0, rng.randrange(8000, 30_000), clauses=clauses)
    rated = [{**clause, "risk": rng.choice(["low", "low", "medium", "high"])} for clause in clauses]
    steps.add("risks", 4.0, rng.randrange(9000, 35_000), clauses=rated)
    steps.add("compare", 1.5, rng.randrange(3000, 9000), template="msa-2024", deviations=len(rated))
    risky = [clause["number"] for clause in rated if clause["risk"] == "high"]
    steps.add("report", 1.0, rng.randrange(800, 2000), report={"high": risky, "of": len(rated)})
    return Story(
        {"file": f"s3://contracts/{file}", "language": "en"},
        {"model": "reasoner-1", "effort": "high", "api_key": "demo-not-a-real-key-2"},
        {"risky_clauses": risky},
        steps,
        {"document": file, "user": _user(rng)},
    )


def lead_enrichment(rng: Random) -> Story:
    """Look a company up, score it, and write it back: short, cheap and frequent."""
    domain = f"{rng.choice(['blue', 'north', 'fast', 'green'])}-{rng.randrange(10, 999)}.example"
    score = rng.randint(1, 99)
    steps = _Steps({"domain": domain})
    steps.add("lookup", 1.2, company={"name": domain.title(), "employees": rng.randint(3, 4000)})
    steps.add("enrich", 1.0, rng.randrange(200, 600), industry=rng.choice(["retail", "energy"]))
    steps.add("score", 0.6, rng.randrange(80, 200), score=score)
    steps.add("write-back", 0.4, crm_id=rng.randrange(10**6, 10**7))
    return Story({"domain": domain}, {"model": "talker-small"}, {"score": score}, steps, {})


def research_agent(rng: Random, turns: int | None = None) -> Story:
    """Search and read until a question is answered, with a message list that grows and grows."""
    turns = turns or rng.randint(8, 20)
    topic = rng.choice(["battery recycling", "heat pumps", "night trains"])
    steps = _Steps({"topic": topic, "messages": [{"role": "user", "content": f"Report: {topic}"}]})
    steps.add("plan", 1.0, 600, plan=["overview", "numbers", "players", "outlook"])
    for turn in range(turns):
        query = f"{topic} {rng.choice(['cost', 'market', 'law', 'study'])} {turn + 1}"
        steps.say("model", 2.0, 1000 + 170 * turn, role="assistant", tool="search", query=query)
        page = {"url": f"https://example.org/{rng.randrange(10**5)}", "text": _page(rng)}
        steps.say("tool:search", 0.8, None, role="tool", name="search", content=page)
    steps.add("report", 4.0, 2000 + 170 * turns, report=_page(rng))
    return Story(
        {"topic": topic, "depth": turns},
        {"model": "reasoner-1", "max_tokens": 8192, "search_token": "demo-not-a-real-token"},
        {"sources": turns, "report": steps[-1].state["report"]},
        steps,
        {"user": _user(rng)},
    )


class _Steps(list[Step]):
    """The steps of a story, each of which changes the state of the one before."""

    def __init__(self, state: State) -> None:
        self._state = state

    def add(self, node: str, weight: float, tokens: int | None = None, **changes: Any) -> None:
        """Add a node that sets these keys of the state."""
        self._state = {**self._state, **changes}
        self.append(Step(node, weight, self._state, tokens))

    def say(self, node: str, weight: float, tokens: int | None, **message: Any) -> None:
        """Add a node that adds a message to the state."""
        self.add(node, weight, tokens, messages=[*self._state["messages"], message])


def _user(rng: Random) -> str:
    return rng.choice(["ada", "boris", "chiara", "dana", "emil", "farah"])


def _page(rng: Random) -> str:
    return " ".join(rng.choices(_SENTENCES, k=rng.randint(2, 5)))


_RATE_LIMIT = Failure(
    "model",
    "RateLimitError: 429 Too Many Requests: 40,000 tokens a minute are used up, try in 21 s",
    "models/client.py",
    204,
    "raise RateLimitError.of(response)",
    is_transient=True,
)
_TIMEOUT = Failure(
    "",
    "TimeoutError: no answer from https://models.internal/v1/chat within 60 s",
    "models/client.py",
    188,
    "response = session.post(url, json=body, timeout=60)",
    is_transient=True,
)
LOST_CONNECTION = Failure(
    "",
    "OperationalError: consuming input failed: server closed the connection unexpectedly",
    "db.py",
    33,
    "cursor.execute(query, values)",
    is_transient=True,
)
"""What can happen to any workflow in any node."""

WORKFLOWS = (
    Workflow(
        "invoice-extraction",
        invoice_extraction,
        median_seconds=14,
        sigma=0.45,
        by_day=30,
        by_night=8,
        failures=(
            Failure(
                "validate",
                "ValidationError: 1 validation error for Invoice\n"
                "vat_id\n  Field required [type=missing, input_type=dict]",
                "invoices/nodes.py",
                143,
                "checked = Invoice.model_validate(state['invoice'])",
            ),
            Failure(
                "ocr",
                "PdfReadError: EOF marker not found, the file seems to be cut off",
                "invoices/ocr.py",
                57,
                "reader = PdfReader(content)",
            ),
            _TIMEOUT._replace(node="extract"),
        ),
        failure_rate=0.03,
        recent_failure_rate=0.3,
        usd_per_million_tokens=0.6,
        waits_before="approve",
        waits_for="approval by finance",
    ),
    Workflow(
        "support-agent",
        support_agent,
        median_seconds=24,
        sigma=0.6,
        by_day=32,
        by_night=20,
        failures=(
            _RATE_LIMIT,
            Failure(
                "tool",
                "KeyError: 'tracking_number'",
                "support/tools.py",
                92,
                "return shipment['tracking_number']",
            ),
        ),
        failure_rate=0.05,
        cancel_rate=0.05,
        usd_per_million_tokens=4.0,
    ),
    Workflow(
        "document-pipeline",
        document_pipeline,
        median_seconds=45,
        sigma=0.5,
        by_day=12,
        by_night=4,
        failures=(
            Failure(
                "load",
                "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe4 in position 8117: "
                "invalid continuation byte",
                "documents/nodes.py",
                31,
                "text = content.decode()",
            ),
            _TIMEOUT._replace(node="embed"),
        ),
        failure_rate=0.04,
        usd_per_million_tokens=0.12,
        children=("invoice-extraction", 4, 0.1),
    ),
    Workflow(
        "nightly-import",
        nightly_import,
        median_seconds=540,
        sigma=0.25,
        by_day=0.2,
        by_night=60,
        failures=(
            Failure(
                "import",
                'IntegrityError: duplicate key value violates unique constraint "orders_number"\n'
                "DETAIL:  Key (number)=(2024-118731) already exists.",
                "imports/upsert.py",
                76,
                "cursor.executemany(UPSERT, rows)",
            ),
            Failure(
                "download",
                "ConnectionResetError: [Errno 104] Connection reset by peer",
                "imports/sftp.py",
                40,
                "client.get(name, target)",
                is_transient=True,
            ),
        ),
        failure_rate=0.08,
        children=("lead-enrichment", 2, 0.5),
    ),
    Workflow(
        "contract-review",
        contract_review,
        median_seconds=95,
        sigma=0.5,
        by_day=8,
        by_night=1,
        failures=(
            Failure(
                "clauses",
                "OutputParserError: the model's answer is not JSON: line 1 column 4097 (cut off?)",
                "contracts/nodes.py",
                88,
                "return json.loads(answer.text)['clauses']",
            ),
            _RATE_LIMIT._replace(node="risks"),
        ),
        failure_rate=0.07,
        cancel_rate=0.03,
        usd_per_million_tokens=9.0,
    ),
    Workflow(
        "lead-enrichment",
        lead_enrichment,
        median_seconds=3.2,
        sigma=0.4,
        by_day=20,
        by_night=10,
        failures=(_TIMEOUT._replace(node="enrich"),),
        failure_rate=0.02,
        usd_per_million_tokens=0.3,
    ),
    Workflow(
        "research-agent",
        research_agent,
        median_seconds=420,
        sigma=0.4,
        by_day=1.5,
        by_night=0.5,
        failures=(_RATE_LIMIT,),
        failure_rate=0.06,
        cancel_rate=0.06,
        usd_per_million_tokens=2.5,
    ),
)
LONG = WORKFLOWS[-1]._replace(tell=partial(research_agent, turns=160), median_seconds=2400)
"""The workflow whose run has more than 300 steps."""
