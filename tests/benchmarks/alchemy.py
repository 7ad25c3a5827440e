"""The same design on SQLAlchemy 2's ORM: the same tables, statements, JSON and pragmas."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    create_engine,
    event,
    func,
    select,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class JSONText(TypeDecorator[Any]):
    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        import json

        return None if value is None else json.dumps(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        import json

        return None if value is None else json.loads(value)


class UTCDateTime(TypeDecorator[datetime]):
    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return value

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value and (value if value.tzinfo else value.replace(tzinfo=UTC))


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON}


class Run(Base):
    __tablename__ = "workflow_runs"
    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    workflow_name: Mapped[str] = mapped_column(String(256))
    status: Mapped[str] = mapped_column(String(32))
    config_snapshot: Mapped[Any] = mapped_column(JSONText)
    inputs: Mapped[Any] = mapped_column(JSONText)
    outputs: Mapped[Any] = mapped_column(JSONText)
    error_message: Mapped[str | None] = mapped_column(Text)
    started_at: Mapped[datetime] = mapped_column(UTCDateTime)
    completed_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    duration_seconds: Mapped[float | None] = mapped_column(Float)
    total_tokens: Mapped[int | None] = mapped_column(BigInteger)
    total_cost_usd: Mapped[float | None] = mapped_column(Float)
    heartbeat_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    current_node: Mapped[str | None] = mapped_column(String(128))
    waiting_for: Mapped[str | None] = mapped_column(String(256))
    attempt: Mapped[int] = mapped_column(Integer)
    attempt_started_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    worker: Mapped[str | None] = mapped_column(String(128))
    parent_id: Mapped[str | None] = mapped_column(String(36))
    forked_from_step: Mapped[int | None] = mapped_column(Integer)
    labels: Mapped[Any] = mapped_column(JSONText)


class State(Base):
    __tablename__ = "execution_states"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    run_id: Mapped[str] = mapped_column(String(36))
    step: Mapped[int] = mapped_column(Integer)
    node_id: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime)
    attempt: Mapped[int | None] = mapped_column(Integer)
    duration_seconds: Mapped[float | None] = mapped_column(Float)
    tokens: Mapped[int | None] = mapped_column(BigInteger)
    cost_usd: Mapped[float | None] = mapped_column(Float)
    state_json: Mapped[Any] = mapped_column(JSONText)
    state_delta: Mapped[bytes | None] = mapped_column(LargeBinary)


class Alchemy:
    def __init__(self, url: str) -> None:
        self.engine = create_engine(url)
        self.sqlite = url.startswith("sqlite")
        if self.sqlite:

            @event.listens_for(self.engine, "connect")
            def connect(connection: Any, record: Any) -> None:
                connection.isolation_level = None
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")

            @event.listens_for(self.engine, "begin")
            def begin(connection: Any) -> None:
                connection.exec_driver_sql("BEGIN IMMEDIATE")

    def add(self, run: Any) -> None:
        columns = {column.key: getattr(run, column.key) for column in Run.__table__.columns}
        with Session(self.engine) as session:
            session.add(Run(**columns))
            session.commit()

    def get(self, run_id: str) -> Any:
        with Session(self.engine) as session:
            return session.get(Run, run_id)

    def list(self, name: str) -> Any:
        query = (
            select(Run)
            .where(Run.workflow_name == name)
            .order_by(Run.started_at.desc(), Run.id.desc())
            .limit(100)
        )
        with Session(self.engine) as session:
            return session.scalars(query).all()

    def update_status(self, run_id: str, outputs: Any) -> None:
        now = datetime.now(UTC)
        with Session(self.engine) as session:
            duration = (
                (func.julianday(now) - func.julianday(Run.started_at)) * 86400
                if self.sqlite
                else func.extract("epoch", now - Run.started_at)
            )
            session.execute(
                update(Run)
                .where(Run.id == run_id)
                .values(
                    status="completed", outputs=outputs, completed_at=now, duration_seconds=duration
                )
            )
            session.commit()

    def save_state(self, run_id: str, state: Any) -> int:
        newest = (
            select(State.step)
            .where(State.run_id == Run.id)
            .order_by(State.step.desc())
            .limit(1)
            .correlate(Run)
            .scalar_subquery()
        )
        with Session(self.engine) as session:
            query = select(newest).select_from(Run).where(Run.id == run_id)
            last = session.execute(query.with_for_update(key_share=True)).scalar_one()
            step = 0 if last is None else last + 1
            session.add(
                State(
                    run_id=run_id,
                    step=step,
                    node_id="node",
                    created_at=datetime.now(UTC),
                    state_json=state,
                )
            )
            session.commit()
        return step

    def latest(self, run_id: str) -> Any:
        query = select(State).where(State.run_id == run_id).order_by(State.step.desc()).limit(1)
        with Session(self.engine) as session:
            return session.scalars(query).one().state_json
