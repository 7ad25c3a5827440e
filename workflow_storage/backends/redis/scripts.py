"""What Redis runs by itself, each script one atomic change or one consistent read of a run.

A run, its states and its entries in the indexes lie in one hash slot, so that a script
changes them together. The keys, for a key prefix such as ``{workflow_storage}``:

- ``<prefix>:run:<id>``, a hash: the fields of the run, and next_step, first_step (of the
  states that are kept), state_at (when the newest was saved), version (counts changes),
  attempts (the numbers of those that are over and kept) and ``attempt:<n>``, each as JSON.
- ``<prefix>:states:<id>``, a hash: each state under its step, and under ``m<step>`` its mark:
  when it was saved, a random number, its attempt, its usage, and its node.
- ``<prefix>:runs:<status>`` and ``<prefix>:workflows:<status>``, sorted sets in lexicographic
  order (all scores are 0), whose entries are the start and the id; in the latter behind the
  name of the workflow and a NUL, which no name holds.
- ``<prefix>:labels`` and ``<prefix>:parents``, the same behind the name of a label, a NUL, its value and a
  NUL; and behind the id of the parent and a NUL.
- ``<prefix>:ended:<status>`` and ``<prefix>:ended_workflows:<status>``, of the terminal ones, the same
  with the time of the end.

Times are ISO 8601 with microseconds, 26 characters that sort as the times do. A script gets
all keys that it touches as KEYS: the run, its states, and where it changes the indexes all of
these, in the order of `INDEXES`. So a cluster that is moving the slot refuses to begin it,
rather than to go on in the middle.
"""

import json
from collections.abc import Callable
from hashlib import sha1
from typing import Any, NamedTuple

from workflow_storage.attempts import TAKEN_OVER, FoundRun
from workflow_storage.status import TERMINAL_STATUSES, RunStatus

TIME_LENGTH = 26
"""Characters of a time, with which an entry of an index and a mark begin."""

_ENDS = sorted(status.value for status in TERMINAL_STATUSES)

INDEXES = (
    *(f"runs:{status}" for status in RunStatus.values),
    *(f"workflows:{status}" for status in RunStatus.values),
    *(f"ended:{status}" for status in _ENDS),
    *(f"ended_workflows:{status}" for status in _ENDS),
    "labels",
    "parents",
)
"""What the keys of the indexes end in, in the order of KEYS."""


class Script(NamedTuple):
    """A Lua script, and what Redis knows it by."""

    source: str
    sha: str
    wrote: Callable[[Any], bool] | None
    """Whether its reply says that it has changed something; None if it never does."""


class Call(NamedTuple):
    """A script with its keys, all in one slot, and its arguments."""

    script: Script
    keys: tuple[str, ...]
    args: tuple[Any, ...]

    @property
    def by_sha(self) -> tuple[Any, ...]:
        """The command, for a server that knows the script."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)

    @property
    def by_source(self) -> tuple[Any, ...]:
        """The command, for a server that does not know it yet."""
        return ("EVAL", self.script.source, len(self.keys), *self.keys, *self.args)


_FOUND = ", ".join(f"'{field}'" for field in FoundRun._fields)
_FOUND_NAMES = ", ".join(field.upper() for field in FoundRun._fields)
_FOUND_PLACES = ", ".join(str(place) for place, _ in enumerate(FoundRun._fields, 1))
_PLACES = ", ".join(f"{status} = {place}" for place, status in enumerate(RunStatus.values, 3))
_PLACES_OF_ENDS = ", ".join(
    f"{status} = {place}" for place, status in enumerate(_ENDS, 3 + 2 * len(RunStatus.values))
)
_TERMINAL = ", ".join(f"{status.value} = true" for status in sorted(TERMINAL_STATUSES))

# What the scripts are made of. Each run makes its functions anew, so each has those it calls.

_RUN = f"""
local {_FOUND_NAMES} = {_FOUND_PLACES}

-- What the run is now, as `FoundRun` has it, or false.
local function found()
  local run = redis.call('HMGET', run_key, {_FOUND})
  return run[STATUS] and run
end
"""

_CHANGING = """
local function set(first, last)
  -- Lua passes on a few thousand values at most.
  for i = first, last, 1000 do
    redis.call('HSET', run_key, unpack(ARGV, i, math.min(i + 999, last)))
  end
end

-- ARGV[at] is how many arguments behind it are names and values to set; then come names to clear.
local function change(at)
  local last_set = at + ARGV[at]
  set(at + 1, last_set)
  if #ARGV > last_set then redis.call('HDEL', run_key, unpack(ARGV, last_set + 1)) end
  redis.call('HINCRBY', run_key, 'version', 1)
end
"""

_STATES = f"""
local function store_state(step, mark, state)
  redis.call('HSET', states_key, step, state, 'm' .. step, mark)
  local saved = string.sub(mark, 1, {TIME_LENGTH})
  redis.call('HSET', run_key, 'next_step', step + 1, 'state_at', saved)
end
"""

_INDEXING = (
    f"""
local places, workflows = {{{_PLACES}}}, {len(RunStatus.values)}
local places_of_ends, ended_workflows = {{{_PLACES_OF_ENDS}}}, {len(_ENDS)}
local all_labels, parents = {2 + len(INDEXES) - 1}, {2 + len(INDEXES)}
"""
    + """
local function place()
  return redis.call('HMGET', run_key, 'status', 'workflow_name', 'started_at', 'completed_at',
    'labels', 'parent_id')
end

local function is_in(key, entry)
  return redis.call('ZLEXCOUNT', key, '[' .. entry, '[' .. entry) == 1
end

-- With COUNT instead of a command, how many entries there are not, and whether one is this.
local function in_indexes(command, status, workflow, started, ended, labels, parent, this)
  local missing, is_this = 0, false
  local function index(at, entry)
    if command == 'ZADD' then
      redis.call('ZADD', KEYS[at], 0, entry)
    elseif command == 'COUNT' then
      if not is_in(KEYS[at], entry) then missing = missing + 1 end
      is_this = is_this or (this and this[1] == KEYS[at] and this[2] == entry)
    else
      redis.call('ZREM', KEYS[at], entry)
    end
  end
  local at, entry = places[status], started .. ' ' .. id
  index(at, entry)
  index(at + workflows, workflow .. '\\0' .. entry)
  for name, value in pairs(labels and cjson.decode(labels) or {}) do
    index(all_labels, name .. '\\0' .. value .. '\\0' .. entry)
  end
  if parent then index(parents, parent .. '\\0' .. entry) end
  if ended then
    at, entry = places_of_ends[status], ended .. ' ' .. id
    index(at, entry)
    index(at + ended_workflows, workflow .. '\\0' .. entry)
  end
  return missing, is_this
end

local function enter(run)
  in_indexes('ZADD', unpack(run, 1, 6))
end

local function leave(run)
  in_indexes('ZREM', unpack(run, 1, 6))
end

local function move(before, after)
  for i = 1, 6 do
    if before[i] ~= after[i] then
      leave(before)
      enter(after)
      return
    end
  end
end

local function remove(before)
  redis.call('UNLINK', run_key, states_key)
  leave(before)
end
"""
)

_CHANGING_STATUS = (
    f"""
local terminal, taken_over = {{{_TERMINAL}}}, {json.dumps(TAKEN_OVER)}
"""
    + """
-- Whole seconds since a fixed moment (the days as Howard Hinnant counts them in
-- "chrono-Compatible Low-Level Date Algorithms"), and microseconds.
local function parts(time)
  local year, month, day, hour, minute, second, micros =
    string.match(time, '(%d+)-(%d+)-(%d+)T(%d+):(%d+):(%d+)%.(%d+)')
  month = month - 3
  if month < 0 then year, month = year - 1, month + 12 end
  local days = 365 * year + math.floor(year / 4) - math.floor(year / 100)
    + math.floor(year / 400) + math.floor((153 * month + 2) / 5) + day
  return ((days * 24 + hour) * 60 + minute) * 60 + second, tonumber(micros)
end

-- Seconds from one time to a later one, exact to the microsecond; 0 if the clock went back.
local function seconds_between(start, stop)
  if stop <= start then return 0 end
  local start_seconds, start_micros = parts(start)
  local stop_seconds, stop_micros = parts(stop)
  return ((stop_seconds - start_seconds) * 1000000 + stop_micros - start_micros) / 1000000
end

-- What a field is set to by what `change` takes, or nil.
local function given(at, name)
  for i = at + 1, at + ARGV[at], 2 do
    if ARGV[i] == name then return ARGV[i + 1] end
  end
end

-- Keep what an attempt ended with, if the run goes on from there.
local function keep_attempt(run, status, at, error)
  local attempt = {
    started_at = run[ATTEMPT_STARTED_AT] or nil,
    ended_at = run[COMPLETED_AT] or nil,
    status = run[STATUS],
    error_message = run[ERROR_MESSAGE] or nil,
    node = run[CURRENT_NODE] or nil,
    worker = run[WORKER] or nil,
  }
  if run[STATUS] == 'running' then
    if terminal[status] then return end
    attempt.ended_at, attempt.status = at, status
    if status == 'running' then error = taken_over end
    if error then attempt.status, attempt.error_message = 'failed', error end
  elseif not terminal[run[STATUS]] or run[STATUS] == status then
    return
  end
  local number = run[ATTEMPT]
  if number == '0' then return end
  if redis.call('HSETNX', run_key, 'attempt:' .. number, cjson.encode(attempt)) == 1 then
    local kept = redis.call('HGET', run_key, 'attempts')
    redis.call('HSET', run_key, 'attempts', kept and kept .. ' ' .. number or number)
  end
end

-- Carry out a `StatusChange`, given from ARGV[first] on: the status, the time, whether the
-- duration is given ('' or not), and what `change` takes.
local function change_status(run, first)
  local status, at, before = ARGV[first], ARGV[first + 1], place()
  local started, ended = run[STARTED_AT], false
  local spent = redis.call('HGET', run_key, 'duration_seconds')
  local fields = {'status', status}
  local function add(name, value)
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
  if run[STATUS] == 'running' and ARGV[first + 2] == '' then
    spent = tonumber(spent or 0) + seconds_between(run[ATTEMPT_STARTED_AT] or started, at)
    add('duration_seconds', string.format('%.17g', spent))
  end
  if status == 'running' then add('attempt', run[ATTEMPT] + 1) end
  if terminal[status] then
    ended = at > started and at or started
    add('completed_at', ended)
  end
  keep_attempt(run, status, at, given(first + 3, 'error_message'))
  redis.call('HSET', run_key, unpack(fields))
  if not ended then redis.call('HDEL', run_key, 'completed_at') end
  change(first + 3)
  move(before, place())
end
"""
)


def script(source: str, *parts: str, wrote: Callable[[Any], bool] | None = None) -> Script:
    """Make a script of its source, behind the functions that it calls."""
    keys = "local run_key, states_key, id = KEYS[1], KEYS[2], ARGV[1]\n"
    source = "".join((keys, *parts, source))
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest(), wrote)


def _is_one(reply: Any) -> bool:
    return bool(reply == 1)


def _is_a_step(reply: Any) -> bool:
    return isinstance(reply, int) and reply >= 0


ADD = script(
    """
-- The fields of a new run, as names and values. Returns whether the id was free.
if redis.call('EXISTS', run_key) == 1 then return 0 end
-- First what Redis refuses when its memory is full; UNLINK is not, and what follows it isn't.
set(2, #ARGV)
redis.call('UNLINK', states_key)
enter(place())
return 1
""",
    _CHANGING,
    _INDEXING,
    wrote=_is_one,
)

CHANGE = script(
    """
-- The attempt that the run must be running in or '', and what `change` takes. Returns 1; what the
-- run is if it is not in that attempt.
local run = found()
if not run then return false end
if ARGV[2] ~= '' and (run[STATUS] ~= 'running' or run[ATTEMPT] ~= ARGV[2]) then return run end
change(3)
return 1
""",
    _RUN,
    _CHANGING,
    wrote=_is_one,
)

CHANGE_LABELS = script(
    """
-- The same, where labels change, too; behind the attempt comes what the labels must be as text,
-- '' for none and '*' for any. Returns 0 if they are others.
local run = found()
if not run then return false end
if ARGV[2] ~= '' and (run[STATUS] ~= 'running' or run[ATTEMPT] ~= ARGV[2]) then return run end
local before = place()
if ARGV[3] ~= '*' and ARGV[3] ~= (before[5] or '') then return 0 end
change(4)
move(before, place())
return 1
""",
    _RUN,
    _CHANGING,
    _INDEXING,
    wrote=_is_one,
)

CHANGE_STATUS = script(
    """
-- The expected statuses as '|a|b|' or '', the expected attempt or '', and what `change_status`
-- takes. Returns 1; what the run is if that was not expected.
local run = found()
if not run then return false end
if ARGV[2] ~= '' and not string.find(ARGV[2], '|' .. run[STATUS] .. '|', 1, true) then
  return run
end
if ARGV[3] ~= '' and ARGV[3] ~= run[ATTEMPT] then return run end
change_status(run, 4)
return 1
""",
    _RUN,
    _CHANGING,
    _INDEXING,
    _CHANGING_STATUS,
    wrote=_is_one,
)

REPLACE = script(
    """
-- A version, and what `change` takes, attempts among it. Returns whether the run had it.
local before = place()
if not before[1] or redis.call('HGET', run_key, 'version') ~= ARGV[2] then return 0 end
local kept = redis.call('HGET', run_key, 'attempts')
change(3)
local keeps = ' ' .. (redis.call('HGET', run_key, 'attempts') or '') .. ' '
for number in string.gmatch(kept or '', '%d+') do
  if not string.find(keeps, ' ' .. number .. ' ', 1, true) then
    redis.call('HDEL', run_key, 'attempt:' .. number)
  end
end
move(before, place())
return 1
""",
    _CHANGING,
    _INDEXING,
    wrote=_is_one,
)

FAIL_STALLED = script(
    """
-- A time, and what `change_status` takes, for a run without a sign of life since. Returns whether.
local run = found()
if not run or run[STATUS] ~= 'running' then return 0 end
local signs = redis.call('HMGET', run_key, 'heartbeat_at', 'state_at')
signs[3] = run[ATTEMPT_STARTED_AT] or run[STARTED_AT]
for i = 1, 3 do
  if signs[i] and signs[i] >= ARGV[2] then return 0 end
end
change_status(run, 3)
return 1
""",
    _RUN,
    _CHANGING,
    _INDEXING,
    _CHANGING_STATUS,
    wrote=_is_one,
)

ATTEMPTS = script(
    """
-- Returns what the run is; then the number of each attempt that is kept, and the attempt.
local attempts = {found()}
if not attempts[1] then return false end
for number in string.gmatch(redis.call('HGET', run_key, 'attempts') or '', '%d+') do
  attempts[#attempts + 1] = number
  attempts[#attempts + 1] = redis.call('HGET', run_key, 'attempt:' .. number)
end
return attempts
""",
    _RUN,
)

DELETE = script(
    """
-- A version, or '' for any. Returns 1; 0 for another version, -1 if there is no such run.
local before = place()
if not before[1] then return -1 end
if ARGV[2] ~= '' and redis.call('HGET', run_key, 'version') ~= ARGV[2] then return 0 end
remove(before)
return 1
""",
    _INDEXING,
    wrote=_is_one,
)

DELETE_ENDED = script(
    """
-- When it ended, its status then, and its workflow or '', as an index has them. Deletes the run if
-- it still is so. Returns whether.
local before = place()
if before[1] == ARGV[3] and before[4] == ARGV[2] and (ARGV[4] == '' or ARGV[4] == before[2]) then
  remove(before)
  return 1
end
local at, entry = places_of_ends[ARGV[3]], ARGV[2] .. ' ' .. id
if ARGV[4] ~= '' then at, entry = at + ended_workflows, ARGV[4] .. '\\0' .. entry end
redis.call('ZREM', KEYS[at], entry)
return 0
""",
    _INDEXING,
    wrote=_is_one,
)

INDEX = script(
    """
-- Indexes as keys; the highest and lowest entry, and how many of each index at most, the
-- highest first; or only the bounds, for how many there are.
local found = {}
for i, key in ipairs(KEYS) do
  if ARGV[3] then
    found[i] = redis.call('ZREVRANGEBYLEX', key, ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
  else
    found[i] = redis.call('ZLEXCOUNT', key, ARGV[2], ARGV[1])
  end
end
return found
""",
)

CLEAN = script(
    """
-- The start of a run, and its entry in the indexes that come as KEYS behind its own: taken out
-- of them if the run was evicted by the server, or deleted by somebody else.
local before = place()
if before[1] and before[3] == ARGV[2] then return end
for i = 3, #KEYS do redis.call('ZREM', KEYS[i], ARGV[3]) end
""",
    _INDEXING,
)

MISSING = script(
    """
-- Whether to repair it, and whether to leave a run alone that lists show, as 1. Returns how many
-- entries of the run are not in the indexes.
local run = place()
if not run[1] then return 0 end
if ARGV[3] == '1' and is_in(KEYS[places[run[1]]], run[3] .. ' ' .. id) then return 0 end
local missing = in_indexes('COUNT', unpack(run, 1, 6))
if missing > 0 and ARGV[2] == '1' then enter(run) end
return missing
""",
    _INDEXING,
)

STRAY = script(
    """
-- The key of an index, an entry in it of the run, and whether to repair it, as 1. Returns 1 if the
-- run has no such entry.
if not is_in(ARGV[2], ARGV[3]) then return 0 end
local run = place()
if run[1] then
  run[7] = {ARGV[2], ARGV[3]}
  local _, is_this = in_indexes('COUNT', unpack(run, 1, 7))
  if is_this then return 0 end
end
if ARGV[4] == '1' then redis.call('ZREM', ARGV[2], ARGV[3]) end
return 1
""",
    _INDEXING,
)

APPEND = script(
    """
-- The attempt that the run must be running in or '', what the step must be with its base and the
-- mark of that ('5 4 mark') or '', the mark, the state, and what `change` takes. Returns the
-- step; the next step, less than 0, minus 1 if it is not as it must be; what the run is if it is
-- not in that attempt.
local run = redis.call('HMGET', run_key, 'status', 'attempt', 'next_step')
if not run[1] then return false end
if ARGV[2] ~= '' and (run[1] ~= 'running' or run[2] ~= ARGV[2]) then return found() end
local next_step = run[3] or '0'
if ARGV[3] ~= '' then
  local step, base, mark = string.match(ARGV[3], '^(%d+) (%d+) (.*)$')
  if step ~= next_step or redis.call('HGET', states_key, 'm' .. base) ~= mark then
    return -1 - next_step
  end
end
store_state(next_step, ARGV[4], ARGV[5])
change(6)
return tonumber(next_step)
""",
    _RUN,
    _STATES,
    _CHANGING,
    wrote=_is_a_step,
)

APPEND_AT = script(
    """
-- A first step or '', the step, its base or '', the mark of the base, the mark, the state.
-- Returns the step, as APPEND; with a first step, only to a run without states.
local next_step = redis.call('HGET', run_key, 'next_step')
if not next_step and redis.call('EXISTS', run_key) == 0 then return false end
next_step = next_step or '0'
if (ARGV[2] ~= '' and '0' or ARGV[3]) ~= next_step then return -1 - next_step end
if ARGV[4] ~= '' and redis.call('HGET', states_key, 'm' .. ARGV[4]) ~= ARGV[5] then
  return -1 - next_step
end
if ARGV[2] ~= '' then redis.call('HSET', run_key, 'first_step', ARGV[2]) end
store_state(ARGV[3], ARGV[6], ARGV[7])
redis.call('HINCRBY', run_key, 'version', 1)
return tonumber(ARGV[3])
""",
    _STATES,
    wrote=_is_a_step,
)

CHAIN = script(
    """
-- A step, '' for the newest, or 'base' for the base of the next one. Returns the next step and
-- the first that is kept; then step, mark and state of that one, of its base, and so on, up to
-- one that is stored whole.
local bounds = redis.call('HMGET', run_key, 'next_step', 'first_step')
local chain = {bounds[1] or '0', bounds[2] or '0'}
local step = tonumber(ARGV[2])
if ARGV[2] == '' then step = tonumber(chain[1]) - 1 end
if ARGV[2] == 'base' then step = bit.band(tonumber(chain[1]), tonumber(chain[1]) - 1) end
if step >= tonumber(chain[1]) then return chain end
while step >= 0 do
  local state = redis.call('HMGET', states_key, 'm' .. step, step)
  if not state[2] then break end
  chain[#chain + 1] = step
  chain[#chain + 1] = state[1]
  chain[#chain + 1] = state[2]
  if step == 0 or string.byte(state[2]) ~= 1 then break end
  step = bit.band(step, step - 1)
end
return chain
""",
)

PAGE = script(
    """
-- The step after which to begin, and how many. Returns step, mark and state of each.
local bounds = redis.call('HMGET', run_key, 'first_step', 'next_step')
local first = math.max(tonumber(bounds[1] or 0), tonumber(ARGV[2]) + 1)
local last = math.min(tonumber(bounds[2] or 0) - 1, first + tonumber(ARGV[3]) - 1)
local page = {}
for step = first, last do
  local state = redis.call('HMGET', states_key, 'm' .. step, step)
  page[#page + 1] = step
  page[#page + 1] = state[1]
  page[#page + 1] = state[2]
end
return page
""",
)

TRIM = script(
    """
-- The first step to keep or '' for none, and step, mark and whole state of each that is to be
-- stored whole for that (with '' for one that is left as it is). Returns how many states were
-- deleted; -1 if the states are not those that were read.
local bounds = redis.call('HMGET', run_key, 'status', 'first_step', 'next_step')
if not bounds[1] then return false end
local first, next_step = tonumber(bounds[2] or 0), tonumber(bounds[3] or 0)
local keep = ARGV[2] == '' and next_step or math.max(tonumber(ARGV[2]), first)
local replaced = {}
for i = 3, #ARGV, 3 do
  if redis.call('HGET', states_key, 'm' .. ARGV[i]) ~= ARGV[i + 1] then return -1 end
  replaced[tonumber(ARGV[i])] = true
end
if keep > next_step then return -1 end
-- The lowest bit that is set grows from one of these to the next.
local step = keep
while step < next_step and step > 0 do
  local base = bit.band(step, step - 1)
  if base < keep and not replaced[step] then
    local state = redis.call('HGET', states_key, step)
    if string.byte(state or '') == 1 then return -1 end
  end
  step = step + step - base
end
for i = 3, #ARGV, 3 do
  if ARGV[i + 2] ~= '' then redis.call('HSET', states_key, ARGV[i], ARGV[i + 2]) end
end
if keep == next_step then
  redis.call('UNLINK', states_key)
  redis.call('HDEL', run_key, 'first_step', 'next_step', 'state_at')
else
  for old = first, keep - 1, 1000 do
    local fields = {}
    for step = old, math.min(old + 999, keep - 1) do
      fields[#fields + 1] = step
      fields[#fields + 1] = 'm' .. step
    end
    redis.call('HDEL', states_key, unpack(fields))
  end
  redis.call('HSET', run_key, 'first_step', keep)
end
redis.call('HINCRBY', run_key, 'version', 1)
return keep - first
""",
    wrote=_is_a_step,
)
