"""What Redis runs by itself, each script one atomic change or one consistent read of a run.

A run, its states and its entries in the indexes lie in one hash slot, so that a script
changes them together. The keys, for a key prefix such as ``{workflow_storage}``:

- ``<prefix>:run:<id>``, a hash: the fields of the run, and next_step, first_step (of the
  states that are kept), state_at (when the newest was saved) and version (counts changes).
- ``<prefix>:states:<id>``, a hash: each state under its step, and under ``m<step>`` when it
  was saved, a random mark, and its node.
- ``<prefix>:runs:<status>`` and ``<prefix>:workflows:<status>``, sorted sets in lexicographic
  order (all scores are 0), whose entries are the start and the id; in the latter behind the
  name of the workflow and a NUL, which no name holds.
- ``<prefix>:ended``, the same with the time of the end.

Times are ISO 8601 with microseconds, 26 characters that sort as the times do. A script gets
all keys that it touches as KEYS: the run, its states, and where it changes the indexes all of
these, in the order of `INDEXES`. So a cluster that is moving the slot refuses to begin it,
rather than to go on in the middle.
"""

from collections.abc import Callable
from hashlib import sha1
from typing import Any, NamedTuple

from workflow_storage.status import RunStatus

INDEXES = (
    *(f"runs:{status}" for status in RunStatus.values),
    *(f"workflows:{status}" for status in RunStatus.values),
    "ended",
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


_PLACES = ", ".join(f"{status} = {place}" for place, status in enumerate(RunStatus.values, 3))
_COMMON = (
    f"""
local run_key, states_key, id = KEYS[1], KEYS[2], ARGV[1]
local places, workflows, ended_at = {{{_PLACES}}}, {len(RunStatus.values)}, KEYS[#KEYS]
"""
    + """
local function place()
  return redis.call('HMGET', run_key, 'status', 'workflow_name', 'started_at', 'completed_at')
end

local function leave(status, workflow, started, ended)
  local at, entry = places[status], started .. ' ' .. id
  redis.call('ZREM', KEYS[at], entry)
  redis.call('ZREM', KEYS[at + workflows], workflow .. '\\0' .. entry)
  if ended then redis.call('ZREM', ended_at, ended .. ' ' .. id) end
end

local function enter(status, workflow, started, ended)
  local at, entry = places[status], started .. ' ' .. id
  redis.call('ZADD', KEYS[at], 0, entry)
  redis.call('ZADD', KEYS[at + workflows], 0, workflow .. '\\0' .. entry)
  if ended then redis.call('ZADD', ended_at, 0, ended .. ' ' .. id) end
end

local function set(first, last)
  if last > first then redis.call('HSET', run_key, unpack(ARGV, first, last)) end
end

local function clear(first, last)
  if last >= first then redis.call('HDEL', run_key, unpack(ARGV, first, last)) end
end

-- ARGV[3] is the last argument that is set, from the fourth on; behind it are names to clear.
local function change(before)
  local last_set = tonumber(ARGV[3])
  set(4, last_set)
  clear(last_set + 1, #ARGV)
  local after = place()
  for i = 1, 4 do
    if before[i] ~= after[i] then
      leave(unpack(before, 1, 4))
      enter(unpack(after, 1, 4))
      break
    end
  end
  redis.call('HINCRBY', run_key, 'version', 1)
end

local function remove(before)
  redis.call('UNLINK', run_key, states_key)
  leave(unpack(before, 1, 4))
end
"""
)


def _script(source: str, wrote: Callable[[Any], bool] | None = None) -> Script:
    source = _COMMON + source
    return Script(source, sha1(source.encode(), usedforsecurity=False).hexdigest(), wrote)


def _is_one(reply: Any) -> bool:
    return bool(reply == 1)


def _is_a_number(reply: Any) -> bool:
    return reply is not None and reply >= 0


ADD = _script(
    """
-- The fields of a new run, as names and values. Returns whether the id was free.
if redis.call('EXISTS', run_key) == 1 then return 0 end
-- First what Redis refuses when its memory is full; UNLINK is not, and what follows it isn't.
set(2, #ARGV)
redis.call('UNLINK', states_key)
enter(unpack(place(), 1, 4))
return 1
""",
    wrote=_is_one,
)

CHANGE = _script(
    """
-- The expected statuses as '|a|b|' or '', the last argument that is set, names and values to
-- set, names to clear. Returns the status that the run had, and whether that was expected.
local before = place()
if not before[1] then return false end
if ARGV[2] ~= '' and not string.find(ARGV[2], '|' .. before[1] .. '|', 1, true) then
  return {before[1], 0}
end
change(before)
return {before[1], 1}
""",
    wrote=lambda reply: bool(reply and reply[1]),
)

REPLACE = _script(
    """
-- A version, then as CHANGE, for a run that has it. Returns whether it was.
local before = place()
if not before[1] or redis.call('HGET', run_key, 'version') ~= ARGV[2] then return 0 end
change(before)
return 1
""",
    wrote=_is_one,
)

FAIL_STALLED = _script(
    """
-- A time, then as CHANGE, for a run that gave no sign of life since. Returns whether.
local before = place()
if before[1] ~= 'running' or before[3] >= ARGV[2] then return 0 end
local signs = redis.call('HMGET', run_key, 'heartbeat_at', 'state_at')
for i = 1, 2 do
  if signs[i] and signs[i] >= ARGV[2] then return 0 end
end
change(before)
return 1
""",
    wrote=_is_one,
)

DELETE = _script(
    """
-- A version, or '' for any. Returns 1; 0 for another version, -1 if there is no such run.
local before = place()
if not before[1] then return -1 end
if ARGV[2] ~= '' and redis.call('HGET', run_key, 'version') ~= ARGV[2] then return 0 end
remove(before)
return 1
""",
    wrote=_is_one,
)

DELETE_ENDED = _script(
    """
-- When it ended, the statuses as '|a|b|', a workflow or ''. Deletes the run if it still ended
-- then, and is one of these. Returns whether.
local before = place()
if not before[1] or before[4] ~= ARGV[2] then
  redis.call('ZREM', ended_at, ARGV[2] .. ' ' .. id)
  return 0
end
if not string.find(ARGV[3], '|' .. before[1] .. '|', 1, true) then return 0 end
if ARGV[4] ~= '' and ARGV[4] ~= before[2] then return 0 end
remove(before)
return 1
""",
    wrote=_is_one,
)

INDEX = _script(
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

CLEAN = _script(
    """
-- The start of a run, and its entry in the indexes that come as KEYS behind its own: taken out
-- of them if the run was evicted by the server, or deleted by somebody else.
local before = place()
if before[1] and before[3] == ARGV[2] then return end
for i = 3, #KEYS do redis.call('ZREM', KEYS[i], ARGV[3]) end
"""
)

APPEND = _script(
    """
-- What the step must be or '', its base or '', the mark of the base, the time, the mark, the
-- state. Returns the step; the next step, less than 0, minus 1 if it is not as it must be.
local next_step = redis.call('HGET', run_key, 'next_step')
if not next_step then
  if redis.call('EXISTS', run_key) == 0 then return false end
  next_step = '0'
end
if ARGV[2] ~= '' and ARGV[2] ~= next_step then return -1 - next_step end
if ARGV[3] ~= '' and redis.call('HGET', states_key, 'm' .. ARGV[3]) ~= ARGV[4] then
  return -1 - next_step
end
redis.call('HSET', states_key, next_step, ARGV[7], 'm' .. next_step, ARGV[6])
redis.call('HSET', run_key, 'next_step', next_step + 1, 'state_at', ARGV[5])
redis.call('HINCRBY', run_key, 'version', 1)
return tonumber(next_step)
""",
    wrote=_is_a_number,
)

APPEND_AT = _script(
    """
-- A first step or '', the step, its base or '', the mark of the base, the time, the mark, the
-- state. Returns the step, as APPEND; with a first step, only to a run without states.
local next_step = redis.call('HGET', run_key, 'next_step')
if not next_step and redis.call('EXISTS', run_key) == 0 then return false end
next_step = next_step or '0'
if ARGV[2] ~= '' then
  if next_step ~= '0' then return -1 - next_step end
  redis.call('HSET', run_key, 'first_step', ARGV[2])
elseif ARGV[3] ~= next_step then
  return -1 - next_step
end
if ARGV[4] ~= '' and redis.call('HGET', states_key, 'm' .. ARGV[4]) ~= ARGV[5] then
  return -1 - next_step
end
redis.call('HSET', states_key, ARGV[3], ARGV[8], 'm' .. ARGV[3], ARGV[7])
redis.call('HSET', run_key, 'next_step', ARGV[3] + 1, 'state_at', ARGV[6])
redis.call('HINCRBY', run_key, 'version', 1)
return tonumber(ARGV[3])
""",
    wrote=_is_a_number,
)

CHAIN = _script(
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
  if step == 0 or string.sub(state[2], 1, 4) ~= '\\40\\181\\47\\253' then break end
  step = bit.band(step, step - 1)
end
return chain
""",
)

PAGE = _script(
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

TRIM = _script(
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
    if string.sub(state or '', 1, 4) == '\\40\\181\\47\\253' then return -1 end
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
    wrote=_is_a_number,
)
