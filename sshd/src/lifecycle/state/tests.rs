//! The function against its stories, and against a world that takes its effects at their word.

use proptest::prelude::*;

use super::*;

fn run(events: &[Event]) -> (Lifecycle, Vec<Effect>) {
    events.iter().fold((Lifecycle::default(), vec![]), |(lifecycle, mut all), event| {
        let (next, effects) = lifecycle.step(event.clone());
        all.extend(effects);
        (next, all)
    })
}

#[test]
fn two_logins_at_once_start_one_machine() {
    let (lifecycle, effects) = run(&[Event::Login, Event::Login, Event::Forked]);
    assert_eq!(lifecycle.state, State::Running);
    assert_eq!(lifecycle.admitted, 2);
    assert_eq!(effects.iter().filter(|effect| **effect == Effect::Start).count(), 1);
}

#[test]
fn who_is_expected_and_does_not_come_leaves_a_machine_that_stops() {
    let (lifecycle, effects) = run(&[Event::Expected, Event::Forked]);
    assert_eq!(lifecycle.state, State::Lingering);
    assert!(effects.contains(&Effect::SetTimer(Timer::Expected)));
    let (lifecycle, _) = run(&[Event::Expected, Event::Login, Event::Forked]);
    assert_eq!((lifecycle.state, lifecycle.admitted), (State::Running, 1));
}

#[test]
fn a_login_while_stopping_gets_a_new_machine() {
    let (lifecycle, effects) = run(&[
        Event::Login,
        Event::Forked,
        Event::Leave,
        Event::TimerOver,
        Event::Looked(None),
        Event::Login,
        Event::Ended("off".into()),
        failed(),
    ]);
    assert_eq!(lifecycle.state, State::Starting);
    assert_eq!(lifecycle.waiting, 1);
    assert_eq!(effects.last(), Some(&Effect::Start));
}

#[test]
fn a_login_while_lingering_keeps_the_machine() {
    let (lifecycle, effects) =
        run(&[Event::Login, Event::Forked, Event::Leave, Event::Login, Event::TimerOver]);
    assert_eq!(lifecycle.state, State::Running);
    assert!(!effects.contains(&Effect::PowerOff));
}

#[test]
fn a_stop_while_starting_saves_what_was_forked() {
    let (lifecycle, effects) =
        run(&[Event::Login, Event::Stop(StopCause::Shutdown), Event::Forked]);
    assert!(matches!(lifecycle.state, State::Saving(_)));
    assert!(effects.contains(&Effect::Save));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Refuse(_))));
}

#[test]
fn a_guest_that_does_not_power_off_is_killed() {
    let (_, effects) =
        run(&[Event::Login, Event::Forked, Event::Stop(StopCause::Reset), Event::TimerOver]);
    assert!(effects.contains(&Effect::Kill));
}

/// An account whose machine lingers no more and is being saved.
const IDLE: [Event; 5] =
    [Event::Login, Event::Forked, Event::Leave, Event::TimerOver, Event::Looked(None)];

fn after_idle(events: &[Event]) -> (Lifecycle, Vec<Effect>) {
    run(&[&IDLE, events].concat())
}

fn done() -> Event {
    Event::SaveOver(SaveOutcome::Done)
}

fn failed() -> Event {
    Event::SaveOver(SaveOutcome::Failed("no space".into()))
}

#[test]
fn an_idle_machine_is_saved_and_the_next_login_resumes_it() {
    let (lifecycle, effects) = after_idle(&[done(), Event::Ended("stopped".into())]);
    assert_eq!(lifecycle.state, State::Saved);
    assert!(effects.contains(&Effect::Record(Intent::Saved)));
    assert!(!effects.contains(&Effect::PowerOff));
    let (lifecycle, effects) = lifecycle.step(Event::Login);
    assert_eq!(lifecycle.state, State::Resuming);
    assert_eq!(effects, [Effect::Record(Intent::Resuming), Effect::Start]);
    assert_eq!(lifecycle.step(Event::Forked).0.state, State::Running);
}

#[test]
fn a_login_calls_an_idle_save_off_and_waits_for_any_other() {
    let (lifecycle, effects) = after_idle(&[Event::Login]);
    assert_eq!(effects.last(), Some(&Effect::CallOff));
    let (in_time, _) = lifecycle.clone().step(Event::SaveOver(SaveOutcome::CalledOff));
    assert_eq!((in_time.state, in_time.admitted), (State::Running, 1));
    let (late, _) = lifecycle.step(done());
    assert_eq!(late.step(Event::Ended("stopped".into())).0.state, State::Resuming);

    let stop = Event::Stop(StopCause::Admin);
    let (lifecycle, effects) = run(&[Event::Login, Event::Forked, stop, Event::Login]);
    assert!(!effects.contains(&Effect::CallOff) && !effects.contains(&Effect::Save));
    let (lifecycle, effects) = lifecycle.step(Event::Leave);
    assert!(effects.contains(&Effect::Save));
    let (lifecycle, _) = lifecycle.step(done());
    assert_eq!(lifecycle.step(Event::Ended("stopped".into())).0.state, State::Resuming);
}

#[test]
fn a_save_that_fails_is_tried_again_and_then_told() {
    let (lifecycle, effects) = after_idle(&[failed()]);
    assert_eq!(lifecycle.state, State::Lingering);
    assert!(!effects.contains(&Effect::PowerOff));
    let (lifecycle, effects) =
        after_idle(&[failed(), Event::TimerOver, Event::Looked(None), failed()]);
    assert!(effects.contains(&Effect::PowerOff));
    let (lifecycle, _) = lifecycle.step(Event::Ended("off".into()));
    assert_eq!(lifecycle.state, State::Stopped);
    assert!(lifecycle.lost.unwrap().contains("no space"));
}

#[test]
fn sessions_leave_before_a_machine_is_saved() {
    let stop = Event::Stop(StopCause::Shutdown);
    let (lifecycle, effects) = run(&[Event::Login, Event::Forked, stop]);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::EndSessions(_))));
    assert!(!effects.contains(&Effect::Save));
    // Who does not leave is not waited for.
    let (_, effects) = lifecycle.clone().step(Event::TimerOver);
    assert!(effects.contains(&Effect::PowerOff));
    let (_, effects) = lifecycle.step(Event::Leave);
    assert_eq!(effects, [Effect::CancelTimer, Effect::Save]);
}

#[test]
fn what_is_not_saved_in_time_is_powered_off() {
    let stop = |cause| Event::Stop(cause);
    let (late, _) = run(&[Event::Login, Event::Forked, stop(StopCause::Shutdown)]);
    // Before the save: sessions have not left.
    let (lifecycle, effects) = late.clone().step(stop(StopCause::OutOfTime));
    assert!(effects.contains(&Effect::PowerOff));
    assert!(lifecycle.lost.unwrap().contains("no time"));
    // During the save: called off, then powered off; one that was done after all counts.
    let (saving, _) = late.step(Event::Leave);
    let (saving, effects) = saving.step(stop(StopCause::OutOfTime));
    assert!(effects.contains(&Effect::CallOff), "{effects:?}");
    let (off, effects) = saving.clone().step(Event::SaveOver(SaveOutcome::CalledOff));
    assert!(effects.contains(&Effect::PowerOff), "{effects:?}");
    assert_eq!(off.step(Event::Ended("off".into())).0.state, State::Stopped);
    let (saved, _) = saving.step(done());
    assert_eq!(saved.step(Event::Ended("off".into())).0.state, State::Saved);
}

#[test]
fn a_reset_drops_what_was_saved_whenever_it_comes() {
    let reset = || Event::Stop(StopCause::Reset);
    let end = || Event::Ended("off".into());
    let called_off = || Event::SaveOver(SaveOutcome::CalledOff);
    for events in [
        &[done(), end(), reset()][..],
        &[done(), reset(), end()],
        &[reset(), done(), end()],
        &[reset(), called_off(), end()],
        &[reset(), end(), done()],
        &[reset(), Event::Login, called_off(), Event::Login, end()],
    ] {
        let (lifecycle, effects) = after_idle(events);
        assert!(matches!(lifecycle.state, State::Stopped | State::Starting), "{events:?}");
        assert!(effects.contains(&Effect::Drop), "{events:?}");
    }
}

#[test]
fn policies_keep_and_discard() {
    let with = |policy, events: &[Event]| {
        let mut lifecycle = run(&[Event::Login, Event::Forked, Event::Leave]).0;
        lifecycle.policy = policy;
        events.iter().fold((lifecycle, vec![]), |(lifecycle, mut all), event| {
            let (next, effects) = lifecycle.step(event.clone());
            all.extend(effects);
            (next, all)
        })
    };
    let (kept, effects) = with(Policy::Keep, &[Event::TimerOver, Event::TimerOver]);
    assert_eq!((kept.state, effects.len()), (State::Lingering, 2));
    let (_, effects) = with(Policy::Keep, &[Event::Stop(StopCause::Shutdown)]);
    assert!(effects.contains(&Effect::Save));
    let (_, effects) = with(Policy::Discard, &[Event::TimerOver]);
    assert!(effects.contains(&Effect::PowerOff) && !effects.contains(&Effect::Save));
}

fn work() -> Work {
    Work { who: "make (pid 812)".into(), how: "97 % CPU".into() }
}

/// A lingering machine, after `change`, and what the events lead to.
fn lingering(change: impl FnOnce(&mut Lifecycle), events: &[Event]) -> (Lifecycle, Vec<Effect>) {
    let mut lifecycle = run(&[Event::Login, Event::Forked, Event::Leave]).0;
    change(&mut lifecycle);
    events.iter().fold((lifecycle, vec![]), |(lifecycle, mut all), event| {
        let (next, effects) = lifecycle.step(event.clone());
        all.extend(effects);
        (next, all)
    })
}

#[test]
fn work_keeps_a_machine_awake_and_is_named_to_who_comes() {
    let again = [Event::TimerOver, Event::Looked(Some(work()))];
    let extendable = |lifecycle: &mut Lifecycle| lifecycle.extendable = true;
    let (lifecycle, effects) = lingering(extendable, &[again.clone(), again].concat());
    let recheck = Effect::SetTimer(Timer::Recheck);
    assert_eq!(effects, [Effect::Look, recheck.clone(), Effect::Look, recheck]);
    assert_eq!(lifecycle.awake, Some(Awake::Work(work())));
    let (running, effects) = lifecycle.clone().step(Event::Login);
    let greeting = Effect::Greet(Awake::Work(work()));
    assert_eq!(effects, [Effect::CancelTimer, greeting, Effect::Admit]);
    assert_eq!((running.state, running.awake), (State::Running, None));
    // Done with it, the machine goes to rest.
    let (idle, _) = lifecycle.step(Event::TimerOver).0.step(Event::Looked(None));
    assert!(matches!(idle.state, State::Saving(_)));
    assert_eq!(idle.paused, None);
}

#[test]
fn work_beyond_the_limit_is_paused_by_name() {
    let events = [Event::TimerOver, Event::Looked(Some(work()))];
    let (lifecycle, effects) = lingering(|_| (), &events);
    assert!(effects.contains(&Effect::Save));
    assert_eq!(lifecycle.paused, Some(work()));
    let (resting, _) = lifecycle.clone().step(done());
    assert_eq!(resting.paused, Some(work()));
    let (called_off, _) = lifecycle.step(Event::SaveOver(SaveOutcome::CalledOff));
    assert_eq!((called_off.state, called_off.paused), (State::Lingering, None));
}

#[test]
fn a_login_during_a_look_is_let_in_at_once() {
    let extendable = |lifecycle: &mut Lifecycle| lifecycle.extendable = true;
    let (lifecycle, effects) = lingering(extendable, &[Event::TimerOver, Event::Login]);
    assert_eq!(effects, [Effect::Look, Effect::CancelTimer, Effect::Admit]);
    // What is found out then is about nothing any more.
    let (lifecycle, effects) = lifecycle.step(Event::Looked(None));
    assert_eq!((lifecycle.state, effects), (State::Running, vec![]));
}

#[test]
fn a_hold_counts_until_it_ends() {
    for policy in [Policy::Save, Policy::Discard] {
        let held = |lifecycle: &mut Lifecycle| {
            lifecycle.held = Some(99);
            lifecycle.policy = policy;
        };
        let (mut lifecycle, effects) = lingering(held, &[Event::TimerOver]);
        assert_eq!(effects, [Effect::SetTimer(Timer::Recheck)]);
        assert_eq!(lifecycle.awake, Some(Awake::Held(99)));
        // A stop stops all the same.
        let (stopped, _) = lifecycle.clone().step(Event::Stop(StopCause::Admin));
        assert!(matches!(stopped.state, State::Saving(_) | State::Stopping(_)));
        lifecycle.held = None;
        let (lifecycle, _) = lifecycle.step(Event::TimerOver);
        let (lifecycle, _) = lifecycle.step(Event::Looked(None));
        assert!(matches!(lifecycle.state, State::Saving(_) | State::Stopping(_)));
    }
}

#[test]
fn what_an_operator_changes_counts_at_once() {
    let held = |lifecycle: &mut Lifecycle| lifecycle.held = Some(99);
    let (mut lifecycle, effects) = lingering(held, &[Event::Reconsider]);
    assert_eq!(effects, [Effect::SetTimer(Timer::Recheck)]);
    assert_eq!(lifecycle.awake, Some(Awake::Held(99)));
    lifecycle.held = None;
    let (lifecycle, effects) = lifecycle.step(Event::Reconsider);
    assert_eq!((lifecycle.awake, effects), (None, vec![Effect::SetTimer(Timer::Linger)]));
    // A hold that comes while it is looked counts before what is seen.
    let (mut looking, _) = lingering(|_| (), &[Event::TimerOver, Event::Reconsider]);
    looking.held = Some(99);
    let (lifecycle, effects) = looking.step(Event::Looked(None));
    assert_eq!(effects, [Effect::SetTimer(Timer::Recheck)]);
    assert_eq!(lifecycle.state, State::Lingering);
}

#[test]
fn an_idle_machine_rests_when_its_copy_is_over() {
    let events = [Event::Login, Event::Forked, Event::Copy, Event::Leave, Event::TimerOver];
    let (lifecycle, effects) = run(&events);
    assert_eq!((&lifecycle.state, lifecycle.copying), (&State::Lingering, Copying::RestWaits));
    assert!(effects.contains(&Effect::Copy) && !effects.contains(&Effect::Look));
    // Somebody who comes meanwhile is let in at once, and lingers anew.
    let (back, effects) = lifecycle.clone().step(Event::Login);
    assert_eq!((back.copying, effects.last()), (Copying::UnderWay, Some(&Effect::Admit)));
    assert_eq!(back.step(Event::CopyOver).1, []);
    let (lifecycle, effects) = lifecycle.step(Event::CopyOver);
    assert_eq!(effects, [Effect::Look]);
    assert!(matches!(lifecycle.step(Event::Looked(None)).0.state, State::Saving(_)));
}

/// The agent has forgotten the question by the time it goes on: no answer must not pass for idleness.
#[test]
fn a_look_that_a_copy_cuts_off_is_taken_again_after_it() {
    let (looking, _) = lingering(|_| (), &[Event::TimerOver]);
    let (lifecycle, effects) = looking.step(Event::Copy);
    assert_eq!(effects, [Effect::Copy]);
    let (lifecycle, effects) = lifecycle.step(Event::Looked(None));
    assert_eq!((&lifecycle.state, effects), (&State::Lingering, vec![]));
    assert_eq!(lifecycle.step(Event::CopyOver).1, [Effect::Look]);
}

#[test]
fn a_linger_that_is_set_anew_during_a_copy_counts_after_it() {
    let events = [Event::Login, Event::Forked, Event::Copy, Event::Leave, Event::TimerOver];
    let (lifecycle, effects) = run(&events).0.step(Event::Reconsider);
    assert_eq!(effects, [Effect::SetTimer(Timer::Linger)]);
    let (lifecycle, effects) = lifecycle.step(Event::CopyOver);
    assert_eq!((lifecycle.state, effects), (State::Lingering, vec![]));
}

#[test]
fn whatever_else_ends_the_machine_calls_its_copy_off_first() {
    for end in [
        Event::Stop(StopCause::Admin),
        Event::Stop(StopCause::Reset),
        Event::Stop(StopCause::OutOfTime),
        Event::Dying("reset".into()),
        Event::Ended("gone".into()),
    ] {
        let (lifecycle, effects) = run(&[Event::Login, Event::Forked, Event::Copy]);
        assert_eq!(effects.last(), Some(&Effect::Copy));
        let (lifecycle, effects) = lifecycle.step(end.clone());
        assert_eq!(effects.first(), Some(&Effect::CallOffCopy), "{end:?}");
        // What it comes to is nobody's business any more.
        let state = lifecycle.state.clone();
        let (lifecycle, effects) = lifecycle.step(Event::CopyOver);
        assert_eq!((lifecycle.state, effects), (state, vec![]));
    }
    // There is nothing to copy without a machine.
    assert_eq!(run(&[Event::Copy]).1, []);
    assert_eq!(after_idle(&[Event::Copy]).0.copying, Copying::No);
}

#[test]
fn after_a_failure_the_next_login_tries_again() {
    let (lifecycle, effects) =
        run(&[Event::Login, Event::StartFailed("no base".into()), Event::Login]);
    assert_eq!(lifecycle.state, State::Starting);
    assert!(effects.contains(&Effect::Refuse("no base".into())));
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        1 => Just(Event::Expected),
        4 => Just(Event::Login),
        3 => Just(Event::Leave),
        3 => Just(Event::Forked),
        1 => Just(Event::StartFailed("no".into())),
        1 => Just(Event::Dying("reset".into())),
        2 => Just(Event::Ended("gone".into())),
        2 => Just(Event::TimerOver),
        1 => Just(Event::Stop(StopCause::Admin)),
        1 => Just(Event::Stop(StopCause::Shutdown)),
        1 => Just(Event::Stop(StopCause::OutOfTime)),
        1 => Just(Event::Stop(StopCause::Reset)),
        3 => Just(done()),
        1 => Just(failed()),
        2 => Just(Event::SaveOver(SaveOutcome::CalledOff)),
        2 => Just(Event::Looked(None)),
        2 => Just(Event::Looked(Some(work()))),
        1 => Just(Event::Reconsider),
        2 => Just(Event::Copy),
        1 => Just(Event::CopyOver),
    ]
}

/// Policy, hold and whether work counts, as an operator and the time may change them.
fn wishes() -> impl Strategy<Value = (Policy, Option<i64>, bool)> {
    let policy =
        prop_oneof![4 => Just(Policy::Save), 1 => Just(Policy::Keep), 1 => Just(Policy::Discard)];
    let held = prop_oneof![4 => Just(None), 1 => Just(Some(99))];
    (policy, held, any::<bool>())
}

/// The world the effects act on, to check the function against: at most one machine, and nobody
/// forgotten.
#[derive(Default)]
struct World {
    forking: bool,
    machine: bool,
    saving: bool,
    looking: bool,
    /// A copy is being made; somebody has called it off.
    copying: bool,
    called_off: bool,
    /// The machine's memory is on the disk.
    saved: bool,
    /// Sessions that know that their machine goes away, or is gone.
    told: u32,
    timer: bool,
    waiting: u32,
    admitted: u32,
    recorded: Option<Intent>,
}

impl World {
    /// Whether `event` can happen at all.
    fn allows(&self, event: &Event) -> bool {
        match event {
            Event::Leave => self.admitted > 0,
            Event::Forked | Event::StartFailed(_) => self.forking,
            Event::Dying(_) | Event::Ended(_) => self.machine,
            Event::TimerOver => self.timer,
            Event::SaveOver(_) => self.saving,
            Event::Looked(_) => self.looking,
            // The driver has the others wait.
            Event::Copy => !self.copying,
            Event::CopyOver => self.copying,
            Event::Reconsider | Event::Expected | Event::Login | Event::Stop(_) => true,
        }
    }

    fn before(&mut self, event: &Event) {
        match event {
            Event::Login => self.waiting += 1,
            Event::Leave => {
                self.admitted -= 1;
                self.told = self.told.saturating_sub(1);
            }
            Event::Forked => (self.forking, self.machine) = (false, true),
            Event::StartFailed(_) => self.forking = false,
            // A machine that ends tells its sessions itself.
            Event::Ended(_) => (self.machine, self.told) = (false, self.admitted),
            Event::Dying(_) => self.told = self.admitted,
            Event::TimerOver => self.timer = false,
            Event::SaveOver(outcome) => {
                self.saving = false;
                self.saved |= *outcome == SaveOutcome::Done;
            }
            Event::Looked(_) => self.looking = false,
            Event::CopyOver => (self.copying, self.called_off) = (false, false),
            Event::Expected | Event::Stop(_) | Event::Reconsider | Event::Copy => {}
        }
    }

    fn apply(&mut self, effect: &Effect) {
        if matches!(effect, Effect::Save | Effect::PowerOff | Effect::Kill | Effect::Release) {
            assert!(!self.copying || self.called_off, "a copy is under way");
        }
        match effect {
            Effect::Copy => {
                assert!(self.machine && !self.copying && !self.saving);
                self.copying = true;
            }
            Effect::CallOffCopy => {
                assert!(self.copying && !self.called_off);
                self.called_off = true;
            }
            Effect::Start => {
                assert!(!self.forking && !self.machine, "a second machine");
                assert!(!self.saving, "what is being saved is resumed");
                let intent = if self.saved { Intent::Resuming } else { Intent::Starting };
                assert_eq!(self.recorded, Some(intent), "started before recorded");
                (self.forking, self.saved) = (true, false);
            }
            Effect::Admit => {
                assert!(self.machine, "admitted to no machine");
                self.admitted += std::mem::take(&mut self.waiting);
            }
            Effect::Refuse(_) => self.waiting = 0,
            Effect::Save => {
                assert!(self.machine && !self.saving);
                assert_eq!(self.admitted, 0, "saved under its sessions");
                assert_eq!(self.recorded, Some(Intent::Saving));
                self.saving = true;
            }
            Effect::CallOff => assert!(self.saving),
            Effect::Release => assert!(self.machine && self.saved && self.admitted == 0),
            Effect::Drop => {
                assert!(!self.machine && !self.forking && !self.saving, "dropped while in use");
                self.saved = false;
            }
            Effect::PowerOff => {
                assert!(self.machine && !self.saving && !self.saved);
                assert_eq!(self.told, self.admitted, "a session is lost without a message");
                assert_eq!(self.recorded, Some(Intent::Stopping));
            }
            Effect::Kill => assert!(self.machine && self.told == self.admitted),
            Effect::Look => {
                assert!(self.machine && self.admitted == 0 && !self.saving);
                self.looking = true;
            }
            Effect::Greet(_) => assert!(self.machine && self.waiting > 0),
            Effect::SetTimer(_) => self.timer = true,
            Effect::CancelTimer => self.timer = false,
            Effect::Record(intent) => self.recorded = Some(*intent),
            Effect::Gone => assert!(!self.machine && !self.forking),
            Effect::EndSessions(_) => self.told = self.admitted,
        }
    }

    fn step(&mut self, lifecycle: Lifecycle, event: Event) -> Lifecycle {
        self.before(&event);
        let (next, effects) = lifecycle.step(event);
        effects.iter().for_each(|effect| self.apply(effect));
        // A look that nobody waits for any more is given up.
        self.looking &= next.looking;
        next
    }

    /// What happens next if nobody does anything any more.
    fn next(&self) -> Option<Event> {
        Some(match self {
            World { forking: true, .. } => Event::Forked,
            World { saving: true, .. } => done(),
            World { copying: true, .. } => Event::CopyOver,
            World { looking: true, .. } => Event::Looked(Some(work())),
            World { told: 1.., .. } => Event::Leave,
            World { recorded: Some(Intent::Stopping), machine: true, .. }
            | World { saved: true, machine: true, .. } => Event::Ended("off".into()),
            World { timer: true, .. } => Event::TimerOver,
            _ => return None,
        })
    }
}

proptest! {
    #[test]
    fn at_most_one_machine_and_nobody_is_forgotten(
        events in proptest::collection::vec((event(), wishes()), 0..200)
    ) {
        let mut world = World::default();
        let mut lifecycle = Lifecycle::default();
        for (event, (policy, held, extendable)) in events.into_iter() {
            if !world.allows(&event) {
                continue;
            }
            // As the driver does it, before each event.
            (lifecycle.policy, lifecycle.held, lifecycle.extendable) = (policy, held, extendable);
            lifecycle = world.step(lifecycle, event);
            prop_assert_eq!(lifecycle.looking, world.looking);
            // Nobody is asleep to whom something is due, and nothing is said of a machine in use.
            prop_assert!(lifecycle.awake.is_none() || lifecycle.state == State::Lingering);
            prop_assert_eq!(lifecycle.waiting, world.waiting);
            prop_assert_eq!(lifecycle.admitted, world.admitted);
            let expected = match &lifecycle.state {
                State::Stopped | State::Saved | State::Failed(_) => (false, false),
                State::Starting | State::Resuming => (true, false),
                State::Stopping(stopping) => (stopping.starting, !stopping.starting && !stopping.gone),
                State::Running | State::Lingering | State::Saving(_) => (false, true),
            };
            prop_assert_eq!((world.forking, world.machine), expected);
            prop_assert_eq!(lifecycle.state == State::Saved, world.saved && !world.machine && !world.saving);
            // Whoever waits, waits for something that will happen.
            if world.waiting > 0 {
                prop_assert!(world.forking || world.machine || world.saving);
            }
            // A machine without sessions always has something that ends it.
            if world.machine && world.admitted == 0 && world.waiting == 0 {
                let copying = world.copying && !world.called_off;
                prop_assert!(world.timer || world.saving || world.looking || copying, "nothing will stop {:?}", lifecycle.state);
            }
        }
        // Left alone, and with no wish of an operator, it comes to rest, whatever works in it says:
        // everybody who waits is served, and nothing is half done.
        (lifecycle.policy, lifecycle.held, lifecycle.extendable) = (Policy::Save, None, false);
        for _ in 0..50 {
            let Some(event) = world.next() else { break };
            lifecycle = world.step(lifecycle, event);
        }
        prop_assert_eq!(world.waiting, 0, "{:?}", lifecycle.state);
        let rest = match &lifecycle.state {
            State::Running => world.admitted > 0,
            State::Stopped | State::Saved | State::Failed(_) => world.admitted == 0,
            _ => false,
        };
        prop_assert!(rest, "stuck: {:?}", lifecycle.state);
    }
}
