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
        Event::Login,
        Event::Ended("off".into()),
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
fn a_stop_while_starting_powers_off_what_was_forked() {
    let (lifecycle, effects) =
        run(&[Event::Login, Event::Stop(StopCause::Shutdown), Event::Forked]);
    assert!(matches!(lifecycle.state, State::Stopping(_)));
    assert!(effects.contains(&Effect::PowerOff));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Refuse(_))));
}

#[test]
fn a_guest_that_does_not_power_off_is_killed() {
    let (_, effects) =
        run(&[Event::Login, Event::Forked, Event::Stop(StopCause::Admin), Event::TimerOver]);
    assert!(effects.contains(&Effect::Kill));
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
    ]
}

/// The world the effects act on, to check the function against: at most one machine, and nobody
/// forgotten.
#[derive(Default)]
struct World {
    forking: bool,
    machine: bool,
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
            Event::Expected | Event::Login | Event::Stop(_) => true,
        }
    }

    fn before(&mut self, event: &Event) {
        match event {
            Event::Login => self.waiting += 1,
            Event::Leave => self.admitted -= 1,
            Event::Forked => (self.forking, self.machine) = (false, true),
            Event::StartFailed(_) => self.forking = false,
            Event::Ended(_) => self.machine = false,
            Event::TimerOver => self.timer = false,
            Event::Expected | Event::Stop(_) | Event::Dying(_) => {}
        }
    }

    fn apply(&mut self, effect: &Effect) {
        match effect {
            Effect::Start => {
                assert!(!self.forking && !self.machine, "a second machine");
                assert_eq!(self.recorded, Some(Intent::Starting), "started before recorded");
                self.forking = true;
            }
            Effect::Admit => {
                assert!(self.machine, "admitted to no machine");
                self.admitted += std::mem::take(&mut self.waiting);
            }
            Effect::Refuse(_) => self.waiting = 0,
            Effect::PowerOff => {
                assert!(self.machine);
                assert_eq!(self.recorded, Some(Intent::Stopping));
            }
            Effect::Kill => assert!(self.machine),
            Effect::SetTimer(_) => self.timer = true,
            Effect::CancelTimer => self.timer = false,
            Effect::Record(intent) => self.recorded = Some(*intent),
            Effect::Gone => assert!(!self.machine && !self.forking),
            Effect::EndSessions(_) => {}
        }
    }
}

proptest! {
    #[test]
    fn at_most_one_machine_and_nobody_is_forgotten(
        events in proptest::collection::vec(event(), 0..200)
    ) {
        let mut world = World::default();
        let mut lifecycle = Lifecycle::default();
        for event in events.into_iter() {
            if !world.allows(&event) {
                continue;
            }
            world.before(&event);
            let (next, effects) = lifecycle.step(event);
            lifecycle = next;
            for effect in &effects {
                world.apply(effect);
            }
            prop_assert_eq!(lifecycle.waiting, world.waiting);
            prop_assert_eq!(lifecycle.admitted, world.admitted);
            let expected = match &lifecycle.state {
                State::Stopped | State::Failed(_) => (false, false),
                State::Starting => (true, false),
                State::Stopping(stopping) if stopping.starting => (true, false),
                State::Running | State::Lingering | State::Stopping(_) => (false, true),
            };
            prop_assert_eq!((world.forking, world.machine), expected);
            // Whoever waits, waits for something that will happen.
            if world.waiting > 0 {
                prop_assert!(world.forking || world.machine);
            }
            // A machine without sessions always has a timer that ends it.
            if world.machine && world.admitted == 0 && world.waiting == 0 {
                prop_assert!(world.timer, "nothing will stop {:?}", lifecycle.state);
            }
        }
    }
}
