/* How the slots of a result set survive the death of the daemon, of a worker, and of both, at any step. The
 * words are those of proto/README.md, "Result sets". Spin tries every order of the steps below.
 *
 *   Worker  leases slots and commits them, one request and one reply at a time (client/results.cpp)
 *   Peer    the daemon's coroutine for one worker. One thread runs them all, so a request is one step here,
 *           but for may_be_killed(): before each store, and between the last one and the reply
 *   Daemon  the end of the grace period, and death. The next daemon is there at once: that it takes a while
 *           is the same as workers that come back late
 *
 * What must hold; the numbers stand at the asserts:
 *   1  No slot is committed twice.
 *   2  What was acknowledged stays: committed, by that worker, with that attempt.
 *   3  Who is refused a commit did not commit that attempt.
 *   4  In the end every slot is committed, and nobody waits for ever (Spin: an "invalid end state").
 *   5  No two workers ever hold the same attempt of the same slot.
 *   6  A live worker loses a lease only at the end of a grace period, if it had not come back.
 *
 * Left out: what is in the slots (and so the sealing of a slot's array, which makes a commit more than one
 * step), failed slots, lease_ms, giving back, workers with several connections.
 */
#define SLOTS 2
#define WORKERS 2
#ifndef KILLS
#define KILLS 2  /* of the daemon */
#endif
#ifndef DEATHS
#define DEATHS 1 /* 1: worker 1 may die; worker 0 lives */
#endif

mtype = { free, leased, committed };
mtype = { Hello, Hold, LeaseSlots, CommitSlots };
mtype = { Welcome, Done, Leased, NoneFree, Settled, Committed, NotHolder };

/* ---- Shared memory: outlives the daemon ---- */

typedef Slot {
  mtype state = free; /* state and attempt are one word, stored at once */
  byte attempt;
  byte holder         /* a session; stored before the word, and read only if the slot is not free */
};
Slot slots[SLOTS];
#define is_settled (slots[0].state == committed && slots[1].state == committed)
#define some_free (slots[0].state == free || slots[1].state == free)

/* ---- The daemon's own memory: gone when it dies ---- */

bool in_grace;            /* slots stay leased to sessions that may still come back */
byte session_of[WORKERS]; /* of the peer; 0: it said no Hello to this daemon */
byte last_session;        /* of a mutant */

/* ---- Sockets: they break when the daemon dies ---- */

bool connected[WORKERS];
/* Hello: session. LeaseSlots: waits. CommitSlots: slot, attempt, again. */
chan request[WORKERS] = [1] of { mtype, byte, byte, bool };
/* Welcome: session. Leased: slot, attempt. */
chan reply[WORKERS] = [1] of { mtype, byte, byte };

/* ---- The workers' memory, as far as others or the asserts look at it ---- */

typedef Leases { byte attempt[SLOTS] }; /* 0: not held */
Leases held[WORKERS];
bool is_dead[WORKERS];
#define holds_none(worker) (held[worker].attempt[0] == 0 && held[worker].attempt[1] == 0)

/* ---- For the bounds and the asserts alone ---- */

byte kills;
byte committer[SLOTS]; /* worker + 1 */
typedef Flags { bool slot[SLOTS] };
Flags missed[WORKERS]; /* the lease ended with a grace period */

/* ---- Used within a step, and zero between two, or states would differ only in these ---- */

byte s, a;
bool again;
#define end_step d_step { s = 0; a = 0; again = false }

/* ---- The rules. Each mutant of lease_model_test.py breaks one ---- */

#define is_leased_to(session) (slots[s].state == leased && slots[s].holder == session)
#define was_committed_as_asked (slots[s].state == committed && slots[s].attempt == a)

/* A slot that is freed keeps its attempt; the next lease counts one more. */
#ifdef FORGETS_ATTEMPT
#define attempt_when_free 0
#else
#define attempt_when_free slots[s].attempt
#endif

/* With a session go its leases. What it committed names it too, but stays. */
#ifdef FREES_COMMITTED
#define goes_with(session) (slots[s].state != free && slots[s].holder == session)
#else
#define goes_with(session) is_leased_to(session)
#endif

/* The grace period is for those that did not come back yet. */
#ifdef FREES_THE_RESUMED
#define is_here(session) false
#else
#define is_here(session) (session == session_of[0] || session == session_of[1])
#endif

/* A worker comes back to its session, even when its leases are gone, unless the daemon cannot see whose
 * number that was, as across pid namespaces (pid_namespaces(7)). All holds either way. */
#ifdef NEW_WHEN_LATE
#define can_resume in_grace
#else
#define can_resume true
#endif

/* Nobody has the number of an earlier session: not even the next daemon gives it. */
#ifdef REUSES_SESSIONS
#define new_session(old) last_session + 1; last_session++
#else
#define new_session(old) (old == 0 -> me + 1 : old + WORKERS)
#endif

/* A worker that comes back lists its leases. Of one that it does not list it was never told. */
#if defined NO_HOLD_LIST
#define is_listed(worker) true
#elif defined HOLD_BY_SLOT
#define is_listed(worker) (held[worker].attempt[s] != 0)
#else
#define is_listed(worker) (held[worker].attempt[s] == slots[s].attempt)
#endif

/* A commit that is sent again: was it carried out? The attempt says enough: it was leased once, and only its
 * holder was told. The session would do if a late worker kept it for sure. */
#if defined NO_AGAIN
#define was_committed(session) false
#elif defined AGAIN_BY_SESSION
#define was_committed(session) (was_committed_as_asked && slots[s].holder == session)
#else
#define was_committed(session) was_committed_as_asked
#endif

/* ---- The daemon ---- */

inline break_socket(w) {
  connected[w] = false; session_of[w] = 0;
  if :: len(request[w]) > 0 -> request[w]?_(_, _, _) :: else fi;
  if :: len(reply[w]) > 0 -> reply[w]?_(_, _) :: else fi
}

inline die() {
  printf("MSC: the daemon is killed\n");
  d_step { kills++; in_grace = true; last_session = 0; break_socket(0); break_socket(1) }; end_step
}

inline may_be_killed() {
  if
  :: true
  :: kills < KILLS -> die(); goto end_idle
  fi
}

/* The one store that changes slot s. */
inline store(new_state, new_attempt, new_holder) {
#ifdef CLEARS_HOLDER
  slots[s].holder = 0;
#endif
  may_be_killed();
  d_step {
    assert(slots[s].state != committed); /* 1, 2 */
    slots[s].state = new_state; slots[s].attempt = new_attempt; slots[s].holder = new_holder
  }
}

inline answer(kind, x, y) { reply[me]!kind(x, y); end_step }

proctype Peer(byte me) {
end_idle:
  do
  :: atomic { request[me]?Hello(a, _, _) ->
       if
       :: a != 0 && can_resume -> session_of[me] = a
       :: else -> session_of[me] = new_session(a)
       fi;
       answer(Welcome, session_of[me], 0) }

  :: atomic { request[me]?Hold(_, _, _) -> /* held[me] is the list: the worker waits meanwhile */
       for (s : 0 .. SLOTS - 1) {
         if
         :: goes_with(session_of[me]) && !is_listed(me) -> store(free, attempt_when_free, 0)
         :: else
         fi
       }
       may_be_killed();
       answer(Done, 0, 0) }

  :: atomic { request[me]?[LeaseSlots(_, _, false)] ||
              request[me]?[LeaseSlots(_, _, true)] && (some_free || is_settled) ->
       request[me]?LeaseSlots(_, _, _);
       if
       :: some_free ->
            if :: slots[0].state == free -> s = 0 :: else -> s = 1 fi;
            store(leased, slots[s].attempt + 1, session_of[me]);
            may_be_killed();
            answer(Leased, s, slots[s].attempt)
       :: is_settled -> answer(Settled, 0, 0)
       :: else -> answer(NoneFree, 0, 0)
       fi }

  :: atomic { request[me]?CommitSlots(s, a, again) ->
       if
       :: is_leased_to(session_of[me]) && slots[s].attempt == a ->
            store(committed, a, session_of[me]);
            committer[s] = me + 1;
            may_be_killed();
            answer(Committed, 0, 0)
       :: again && was_committed(session_of[me]) -> answer(Committed, 0, 0)
       :: else -> answer(NotHolder, 0, 0)
       fi }

  :: atomic { is_dead[me] && connected[me] -> /* the end of the socket; what was not read is dropped */
       for (s : 0 .. SLOTS - 1) {
         if
         :: session_of[me] != 0 && goes_with(session_of[me]) -> store(free, attempt_when_free, 0)
         :: else
         fi
       }
       break_socket(me); end_step }
  od
}

inline note_missed(w) {
  if :: held[w].attempt[s] == a -> missed[w].slot[s] = true :: else fi
}

proctype Daemon() {
end_idle:
  do
  :: atomic { in_grace -> /* its timer: at any moment */
       for (s : 0 .. SLOTS - 1) {
         if
         :: goes_with(slots[s].holder) && !is_here(slots[s].holder) ->
              a = slots[s].attempt;
              store(free, attempt_when_free, 0);
              note_missed(0); note_missed(1)
         :: else
         fi
       }
       printf("MSC: the grace period ends\n");
       in_grace = false; end_step }
  :: atomic { kills < KILLS -> die() }
  od
}

/* ---- A worker ---- */

inline send(kind, x, y, z) { request[me]!kind(x, y, z); end_step }

/* The work itself takes no step: it lasts while the reply is unread, or the request. */
inline commit_any() {
  if
  :: held[me].attempt[0] != 0 -> committing = 0
  :: held[me].attempt[1] != 0 -> committing = 1
  fi;
  send(CommitSlots, committing, held[me].attempt[committing], false)
}

/* Who holds something takes more if some is free; who holds nothing waits until there is something to do. */
inline go_on() {
  if
  :: !holds_none(me) -> commit_any()
  :: true -> send(LeaseSlots, 0, 0, holds_none(me))
  fi
}

/* The commit that was under way when the daemon was lost, if any. */
inline send_again() {
  if
  :: committing != SLOTS -> send(CommitSlots, committing, held[me].attempt[committing], true)
  :: else -> go_on()
  fi
}

#define is_mine(s) (slots[s].state == committed && slots[s].attempt == held[me].attempt[s])
inline end_commit() {
  held[me].attempt[committing] = 0; missed[me].slot[committing] = false;
  committing = SLOTS
}

proctype Worker(byte me) {
  byte session;
  byte committing = SLOTS; /* the slot whose commit is under way */

  do
  :: atomic { !connected[me] -> connected[me] = true; send(Hello, session, 0, false) }
  :: atomic { reply[me]?Welcome(a, _) ->
       if
       :: a == session -> send(Hold, 0, 0, false)
       :: else -> session = a; send_again() /* its leases are gone: it learns of each when it commits */
       fi }
  :: atomic { reply[me]?Done(_, _) -> send_again() }
  :: atomic { reply[me]?Leased(s, a) ->
       assert(held[1 - me].attempt[s] != a); /* 5 */
       held[me].attempt[s] = a; go_on() }
  :: atomic { reply[me]?NoneFree(_, _) -> commit_any() }
  :: atomic { reply[me]?Settled(_, _) -> assert(is_settled); /* 4: who lives comes here */ break }
  :: atomic { reply[me]?Committed(_, _) ->
       assert(is_mine(committing) && committer[committing] == me + 1); /* 2 */
       end_commit(); go_on() }
  :: atomic { reply[me]?NotHolder(_, _) ->
       assert(!is_mine(committing));         /* 3 */
       assert(missed[me].slot[committing]);  /* 6 */
       end_commit(); go_on() }
  :: atomic { DEATHS > 0 && me == 1 -> is_dead[me] = true; printf("MSC: it dies\n");
       held[me].attempt[0] = 0; held[me].attempt[1] = 0; session = 0; committing = SLOTS; break }
  od
}

init {
  atomic { run Daemon(); run Peer(0); run Peer(1); run Worker(0); run Worker(1) }
}

/* 4. No fairness is asked for: no step can be repeated for ever. */
ltl all_committed { <> is_settled }
