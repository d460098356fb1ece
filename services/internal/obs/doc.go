// Package obs sets up what makes a process observable: the logger, the meter with
// its Prometheus endpoint, and the tracer. Setup is called once, by main; everybody
// else is handed the results and uses no globals.
//
// It promises one line per log record with control characters escaped, and that
// attributes named like secrets do not show their value (SEC-05). It does not know
// what is measured.
package obs
