//! Events: messages that QEMU sends on its own, not as answers.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::Value;

/// Most events kept for the caller; older ones are dropped and counted.
///
/// A guest can cause any number of events (such as balloon or clock changes), so the queue must be
/// bounded.
pub const EVENT_COUNT_MAX: usize = 256;

/// Most bytes of events kept for the caller, about: a single event may have megabytes.
pub(super) const EVENT_BYTES_MAX: usize = 4 << 20;

/// The event that QEMU sends when the guest starts to run.
const RESUME: &str = "RESUME";

/// The event of a guest that stands still.
const STOP: &str = "STOP";

/// The event of a guest that falls asleep (ACPI S3).
const SUSPEND: &str = "SUSPEND";

/// The event of a guest that was woken.
const WAKEUP: &str = "WAKEUP";

/// One event, as QEMU sent it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// The event's name, e.g. `STOP`.
    pub name: String,
    /// Its data, `Null` when it has none.
    pub data: Value,
    /// When it happened, by QEMU's clock, since 1970.
    pub time: Option<Duration>,
}

impl Event {
    /// Reads a received object as an event, or gives the object back.
    pub(super) fn from_message(mut message: Value) -> Result<Event, Value> {
        let Some(name) = message.get("event").and_then(Value::as_str).map(str::to_owned) else {
            return Err(message);
        };
        let data = message.get_mut("data").map_or(Value::Null, Value::take);
        let time = message.get("timestamp").and_then(|timestamp| {
            let number = |key| timestamp.get(key).and_then(Value::as_u64);
            let micros = Duration::from_micros(number("microseconds")?);
            Duration::from_secs(number("seconds")?).checked_add(micros)
        });
        Ok(Event { name, data, time })
    }
}

/// The events that the caller has not taken yet, oldest first.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    /// Each with its size.
    events: VecDeque<(Event, usize)>,
    dropped: u32,
    stops: u32,
    resumes: u32,
    sleeps: bool,
}

impl EventQueue {
    pub(super) fn push(&mut self, event: Event) {
        match event.name.as_str() {
            STOP => self.stops = self.stops.saturating_add(1),
            RESUME => self.resumes = self.resumes.saturating_add(1),
            SUSPEND => self.sleeps = true,
            WAKEUP => self.sleeps = false,
            _ => {}
        }
        let size = event.name.len() + size_of(&event.data);
        self.events.push_back((event, size));
        let mut bytes: usize = self.events.iter().map(|(_, size)| size).sum();
        while self.events.len() > EVENT_COUNT_MAX || bytes > EVENT_BYTES_MAX {
            let Some((_, size)) = self.events.pop_front() else { break };
            bytes -= size;
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    /// Removes the oldest event that has one of `names`.
    pub(super) fn take_named(&mut self, names: &[&str]) -> Option<Event> {
        let is_named = |(event, _): &(Event, usize)| names.contains(&event.name.as_str());
        let index = self.events.iter().position(is_named)?;
        self.events.remove(index).map(|(event, _)| event)
    }

    pub(super) fn take_all(&mut self) -> Vec<Event> {
        self.events.drain(..).map(|(event, _)| event).collect()
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.into()
    }

    /// Returns the number of `STOP` events so far, including those that were dropped or taken.
    pub(super) fn stops(&self) -> u32 {
        self.stops
    }

    /// Returns the number of `RESUME` events so far, including those that were dropped or taken.
    pub(super) fn resumes(&self) -> u32 {
        self.resumes
    }

    /// Tells whether the guest has fallen asleep since, and was not woken.
    pub(super) fn sleeps(&self) -> bool {
        self.sleeps
    }
}

/// Returns about how many bytes a value takes in memory.
fn size_of(value: &Value) -> usize {
    let own = size_of_val(value);
    own + match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(size_of).sum(),
        Value::Object(values) => {
            values.iter().map(|(name, value)| name.len() + size_of(value)).sum()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(name: &str) -> Event {
        Event { name: name.to_owned(), data: Value::Null, time: None }
    }

    #[test]
    fn an_event_of_a_future_qemu_is_kept() {
        let message = json!({"event": "FROM_THE_FUTURE", "data": {"new": [1]}, "extra": true});
        let event = Event::from_message(message).unwrap();
        assert_eq!(event.name, "FROM_THE_FUTURE");
        assert_eq!(event.data, json!({"new": [1]}));
        assert_eq!(event.time, None);
        let timestamp = json!({"seconds": 7, "microseconds": 250_000});
        let event = Event::from_message(json!({"event": "STOP", "timestamp": timestamp})).unwrap();
        assert_eq!(event.time, Some(Duration::from_millis(7250)));
    }

    #[test]
    fn an_answer_is_not_an_event() {
        let message = json!({"return": {}, "id": 1});
        assert_eq!(Event::from_message(message.clone()), Err(message));
    }

    #[test]
    fn a_full_queue_drops_the_oldest_and_counts_it() {
        let mut queue = EventQueue::default();
        queue.push(event("FIRST"));
        for _ in 0..EVENT_COUNT_MAX {
            queue.push(event("LATER"));
        }
        assert_eq!(queue.dropped(), 1);
        assert_eq!(queue.take_named(&["FIRST"]), None);
        assert_eq!(queue.take_all().len(), EVENT_COUNT_MAX);
    }

    /// 256 events of 4 MiB took 1.1 GiB.
    #[test]
    fn large_events_are_dropped_sooner() {
        let mut queue = EventQueue::default();
        let large = Event { data: json!(["x".repeat(EVENT_BYTES_MAX / 3)]), ..event("LARGE") };
        for _ in 0..5 {
            queue.push(large.clone());
        }
        queue.push(event("STOP"));
        assert_eq!(queue.take_named(&["STOP"]), Some(event("STOP")));
        assert_eq!((queue.dropped(), queue.take_all().len()), (3, 2));
        queue.push(Event { data: json!("x".repeat(EVENT_BYTES_MAX)), ..event("TOO_LARGE") });
        assert!(queue.take_all().is_empty());
    }

    #[test]
    fn a_guest_that_was_let_run_is_counted_whatever_became_of_the_event() {
        let mut queue = EventQueue::default();
        queue.push(event(RESUME));
        for _ in 0..EVENT_COUNT_MAX {
            queue.push(event("RTC_CHANGE"));
        }
        assert_eq!(queue.take_named(&[RESUME]), None);
        assert_eq!(queue.resumes(), 1);
    }

    #[test]
    fn an_event_is_taken_by_name_and_the_others_stay() {
        let mut queue = EventQueue::default();
        queue.push(event("STOP"));
        queue.push(event("RESUME"));
        assert_eq!(queue.take_named(&["RESUME", "SHUTDOWN"]), Some(event("RESUME")));
        assert_eq!(queue.take_all(), [event("STOP")]);
    }
}
