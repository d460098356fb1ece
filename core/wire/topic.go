package wire

// TopicSub is TOPIC_SUB, from a client: PROTOCOL 14.1.
type TopicSub struct {
	Topic string
}

// TopicUnsub is TOPIC_UNSUB, from a client.
type TopicUnsub struct {
	Topic string
}

// TopicPub is TOPIC_PUB, from a client.
type TopicPub struct {
	Topic string
	Data  []byte // one msgpack value; empty stands for nil
}

// TopicMessage is TOPIC_MESSAGE, from a server.
type TopicMessage struct {
	Topic       string
	Data        []byte // one msgpack value; empty stands for nil
	PublisherID string // empty: left out
	Timestamp   uint64 // wall clock of the server, Unix ms
}

// Type implements Message.
func (m *TopicSub) Type() string { return "TOPIC_SUB" }

// AppendTo implements Message.
func (m *TopicSub) AppendTo(dst []byte) []byte {
	return appendText(appendWrapped(dst, m.Type(), 1), "topic", m.Topic)
}

// Type implements Message.
func (m *TopicUnsub) Type() string { return "TOPIC_UNSUB" }

// AppendTo implements Message.
func (m *TopicUnsub) AppendTo(dst []byte) []byte {
	return appendText(appendWrapped(dst, m.Type(), 1), "topic", m.Topic)
}

// Type implements Message.
func (m *TopicPub) Type() string { return "TOPIC_PUB" }

// AppendTo implements Message.
func (m *TopicPub) AppendTo(dst []byte) []byte {
	dst = appendText(appendWrapped(dst, m.Type(), 2), "topic", m.Topic)
	return appendRaw(dst, "data", m.Data)
}

// Type implements Message.
func (m *TopicMessage) Type() string { return "TOPIC_MESSAGE" }

// AppendTo implements Message.
func (m *TopicMessage) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), pairs(3, m.PublisherID != ""))
	dst = appendText(dst, "topic", m.Topic)
	dst = appendRaw(dst, "data", m.Data)
	if m.PublisherID != "" {
		dst = appendText(dst, "publisherId", m.PublisherID)
	}
	return appendNumber(dst, "timestamp", m.Timestamp)
}

// topic reads a payload that is the name of a topic.
func (d *decoder) topic(into *string) *Error {
	err := d.fields("payload", func(key []byte) *Error {
		if string(key) == "topic" {
			return d.resourceName("topic", into)
		}
		d.skip()
		return nil
	})
	if err == nil {
		err = CheckResourceName(*into)
	}
	return err
}

// resourceName reads the name of a topic, counter or lock. CheckResourceName
// judges it.
func (d *decoder) resourceName(field string, into *string) *Error {
	s, ok := d.str()
	if !ok {
		return badMessage(field + " must be a string")
	}
	if len(s) > maxResourceName { // not worth a copy
		return badResourceName()
	}
	*into = string(s)
	return nil
}

func (d *decoder) topicPub() (Message, *Error) {
	m := new(TopicPub)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "topic":
			return d.resourceName("topic", &m.Topic)
		case "data":
			m.Data = d.orNil()
			return nil
		}
		d.skip()
		return nil
	})
	switch {
	case err != nil:
	case len(m.Data) > d.lim.MaxTopicBytes:
		err = &Error{Name: ValueTooLarge, Code: 413, Text: "data is too large for a topic"}
	case d.tooDeep(m.Data):
		err = &Error{Name: ValueTooDeep, Code: 400, Text: "data is nested deeper than 128 containers"}
	case d.hasForeign(m.Data):
		err = foreignValue()
	default:
		err = CheckResourceName(m.Topic)
	}
	return m, err
}

func (d *decoder) topicMessage() (Message, *Error) {
	m := new(TopicMessage)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "topic":
			return d.serverText("topic", &m.Topic)
		case "data":
			m.Data = d.orNil()
			return nil
		case "publisherId":
			return d.serverText("publisherId", &m.PublisherID)
		case "timestamp":
			return d.count("timestamp", &m.Timestamp)
		}
		d.skip()
		return nil
	})
	return m, err
}
