import java.nio.charset.StandardCharsets;
import java.util.concurrent.atomic.AtomicLong;

/**
 * What the two works need of a reading, decoded by hand from framed Avro: one pass over the bytes, nothing made but the
 * id. The schema's fields come as letters from bench/streams.py: s and l a string and a long, S and L the same or null.
 */
public final class Reading {
    static final long ABSENT = Long.MIN_VALUE;
    static final String REGISTER = "import_t1_wh";
    private static final char[] KINDS = System.getProperty("reading.kinds").toCharArray();
    private static final int[] SLOTS = new int[KINDS.length];
    private static final int SCHEMA_ID = Integer.getInteger("reading.schema");

    static {
        String[] names = System.getProperty("reading.names").split(",");
        for (int field = 0; field < names.length; field++) {
            SLOTS[field] = switch (names[field]) {
                case "meter_id" -> 1;
                case "observed_at" -> 2;
                case REGISTER -> 3;
                case "voltage_l1_mv" -> 4;
                case "voltage_l2_mv" -> 5;
                case "voltage_l3_mv" -> 6;
                default -> 0;
            };
        }
    }

    public String meter;
    public long observedUs;
    public long wh = ABSENT;
    public long l1 = ABSENT;
    public long l2 = ABSENT;
    public long l3 = ABSENT;

    public Reading() {}

    /** The reading in a framed datum; anything else is an error, since the bench sends nothing else. */
    static Reading decode(byte[] bytes) {
        if (bytes[0] != 0 || (bytes[1] << 24 | (bytes[2] & 255) << 16 | (bytes[3] & 255) << 8 | bytes[4] & 255) != SCHEMA_ID) {
            throw new IllegalArgumentException("not a framed reading");
        }
        Reading reading = new Reading();
        int at = 5;
        for (int field = 0; field < KINDS.length; field++) {
            char kind = KINDS[field];
            if (kind < 'a' && bytes[at++] == 0) {
                continue;
            }
            long value = 0;
            int shift = 0;
            byte next;
            do {
                next = bytes[at++];
                value |= (next & 127L) << shift;
                shift += 7;
            } while (next < 0);
            value = value >>> 1 ^ -(value & 1);
            if (kind == 's' || kind == 'S') {
                if (SLOTS[field] == 1) {
                    reading.meter = new String(bytes, at, (int) value, StandardCharsets.UTF_8);
                }
                at += (int) value;
                continue;
            }
            switch (SLOTS[field]) {
                case 2 -> reading.observedUs = value;
                case 3 -> reading.wh = value;
                case 4 -> reading.l1 = value;
                case 5 -> reading.l2 = value;
                case 6 -> reading.l3 = value;
                default -> { }
            }
        }
        if (at != bytes.length) {
            throw new IllegalArgumentException("bytes follow the reading");
        }
        return reading;
    }

    long voltage(int phase) {
        return phase == 0 ? l1 : phase == 1 ? l2 : l3;
    }

    /** A row of the deltas; lastUs is ABSENT before the first reading. */
    static void delta(StringBuilder row, Reading reading, long lastUs, long lastWh) {
        boolean isFirst = lastUs == ABSENT;
        boolean isAccepted = isFirst || reading.observedUs > lastUs;
        row.append(reading.meter).append(',');
        if (isAccepted && !isFirst) {
            row.append(lastUs);
        }
        row.append(',').append(reading.observedUs).append(',');
        if (isAccepted && !isFirst) {
            row.append(lastWh);
        }
        row.append(',').append(reading.wh).append(',');
        if (isAccepted) {
            row.append(isFirst ? 0 : reading.wh - lastWh).append(isFirst ? ",first\n" : ",ok\n");
        } else {
            row.append(reading.observedUs == lastUs ? ",duplicate\n" : ",out_of_order\n");
        }
    }

    /** A row of the windows. */
    static void window(StringBuilder row, String meter, int phase, long startUs, long count, long min, long max, long sum) {
        row.append(meter).append(",L").append(phase + 1).append(',').append(startUs).append(',').append(count).append(',')
            .append(min).append(',').append(max).append(',').append((double) sum / count).append('\n');
    }

    /** Tells the bench how many records were taken. */
    static final class Progress {
        private static final AtomicLong TAKEN = new AtomicLong();
        private static final long TOTAL = Long.getLong("records");
        private static final long STEP = Math.max(1, TOTAL / 50);

        static boolean one() {
            long taken = TAKEN.incrementAndGet();
            if (taken % STEP == 0 || taken == TOTAL) {
                System.out.println("records " + taken);
            }
            return taken == TOTAL;
        }
    }
}
